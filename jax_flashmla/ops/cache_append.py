"""Writing new rows to a paged cache, in place where it is donated."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from jax_flashmla import _checks, _limits
from jax_flashmla._windows import find_tokens
from jax_flashmla._xla import vmap
from jax_flashmla._xla.operation import Operation, check_unsharded
from jax_flashmla.cache.format import CacheFormat, format_of_blocks
from jax_flashmla.reference.append import cache_append as reference

if TYPE_CHECKING:
    from jax.typing import ArrayLike


def cache_append(
    blocks: jax.Array,
    rows: jax.Array,
    block_table: jax.Array,
    positions: jax.Array,
    *,
    num_new: ArrayLike | None = None,
    cu_q_lens: jax.Array | None = None,
    format: CacheFormat | None = None,
    kv_scale: ArrayLike | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Writes each sequence's new rows into its blocks, from a token position on.

    Row j of sequence i goes to token position `p = positions[i] + j`: slot `p % block_size` of
    block `block_table[i, p // block_size]`. It is dropped, and nothing written, where p is negative
    or past the table, or where the block's id is outside [0, num_blocks). Two sequences must not be
    given the same slot: which of their rows it then holds is not defined.

    With `cu_q_lens` the rows of a ragged batch are packed, as queries are in `dense_decode`: row j
    of sequence i is rows[cu_q_lens[i] + j]. A row of no sequence is dropped.

    The update is in place inside a jitted function whose caller donates `blocks`, loops included.
    Otherwise XLA copies the whole cache first. Under `jax.vmap` it does so even where the cache is
    donated; where `blocks` is not mapped, the result is a cache for each index. To write to one
    cache in place, make the mapped axis part of b instead.

    Args:
        blocks: the cache [num_blocks, block_size, h_kv, d_qk], bfloat16, float16 or float32. With a
            format [num_blocks, *format.block_shape] in its storage_dtype.
        rows: new rows [b, s_new, h_kv, d_qk], of the same dtype; for formats other than "dense"
            bfloat16, float16 or float32, which are quantised as `quantise` does. With cu_q_lens
            [T, h_kv, d_qk].
        block_table: block ids [b, max_blocks], int32.
        positions: token position [b] of each sequence's first new row, int32.
        num_new: how many of the s_new rows to write [b], int32, clamped to [0, s_new]; by default
            all. With cu_q_lens, of the sequence's own rows.
        cu_q_lens: [b + 1] int32, ascending bounds of each sequence's packed rows. Values are
            clamped to [0, T], and to the one before where they decrease.
        format: how blocks are stored; by default dense, as the array is.
        kv_scale: [] float32, what the codes of an "fp8_row" cache are multiplied with; by default
            1.
        implementation: None picks the platform's best; "kernel" insists on the handler; "xla" is
            the pure-JAX reference.

    Returns:
        The updated blocks.

    Raises:
        ValueError, TypeError: a rank, shape, dtype or option that does not fit.
        NotImplementedError: "kernel" where there is none.
    """
    _checks.check_implementation(implementation)
    if cu_q_lens is None:
        b, s_new, h_kv, d_qk = _checks.check_array(
            "rows", rows, "[b, s_new, h_kv, d_qk]", _checks.CACHE_DTYPES
        )
        _checks.check_batch("rows", b)
    else:
        s_new, h_kv, d_qk = _checks.check_array(
            "rows", rows, "[T, h_kv, d_qk]", _checks.CACHE_DTYPES
        )
        cu_q_lens = _checks.as_cu_q_lens(cu_q_lens)
        b = cu_q_lens.shape[0] - 1
    format = format_of_blocks(format, blocks)
    if format.name == "dense" and rows.dtype != format.dtype:
        raise TypeError(f"rows must have blocks' dtype {format.dtype}, got {rows.dtype}")
    if (h_kv, d_qk) != (format.h_kv, format.d_qk):
        raise ValueError(
            f"rows must end in blocks' [h_kv, d_qk] = [{format.h_kv}, {format.d_qk}], got shape "
            f"{rows.shape}"
        )
    block_table = _checks.as_block_table(block_table, b, format.block_size)
    positions = _checks.as_per_sequence("positions", positions, b)
    if num_new is None:
        num_new = jnp.full(b, s_new, jnp.int32)
    written = _checks.as_per_sequence("num_new", num_new, b)
    kv_scale = _checks.as_kv_scale(kv_scale, format.name)
    if cu_q_lens is not None:
        packed = (rows, cu_q_lens, block_table, positions, written)
        return append_packed(
            blocks, *packed, kv_scale, format=format, implementation=implementation
        )
    (updated,) = append_op(
        blocks,
        rows,
        block_table,
        positions,
        written,
        kv_scale,
        format=format,
        implementation=implementation,
    )
    return updated


def append_packed(
    blocks: jax.Array,
    rows: jax.Array,
    cu_q_lens: jax.Array,
    block_table: jax.Array,
    positions: jax.Array,
    num_new: jax.Array,
    kv_scale: jax.Array,
    *,
    format: CacheFormat,
    implementation: str | None,
) -> jax.Array:
    """cache_append of packed rows, past all checks.

    Dense blocks with h_kv = 1 may be an engine's pages [pages, page_size / pack, pack, row_stride],
    of one block or several. They are updated as they are: a reshape on the way would make XLA copy
    them.
    """
    packed = (rows, cu_q_lens, block_table, positions, num_new)
    check_unsharded("cache_append", tuple(map(jax.typeof, packed)))
    (updated,) = append_op(
        blocks,
        *unpack(*packed, block_size=format.block_size),
        kv_scale,
        format=format,
        implementation=implementation,
    )
    return updated


@functools.partial(jax.jit, inline=True, static_argnames="block_size")
def unpack(
    rows: jax.Array,
    cu_q_lens: jax.Array,
    block_table: jax.Array,
    positions: jax.Array,
    num_new: jax.Array,
    *,
    block_size: int,
) -> tuple[jax.Array, ...]:
    """Packed rows as T sequences with a row and a block each."""
    num_tokens, max_blocks = rows.shape[0], block_table.shape[1]
    tokens = find_tokens(cu_q_lens, num_tokens)
    position = positions[tokens.sequence] + tokens.number  # past 2^31 - 1 it wraps to below 0
    entry = position // block_size
    written = tokens.owned & (tokens.number < num_new[tokens.sequence])
    written &= (position >= 0) & (entry < max_blocks)
    block = block_table[tokens.sequence, jnp.clip(entry, 0, max_blocks - 1)]
    return rows[:, None], block[:, None], position % block_size, written.astype(jnp.int32)


def _batch(
    operands: tuple[jax.Array, ...],
    dims: vmap.Dims,
    *,
    format: CacheFormat,
    implementation: str | None,
) -> tuple[list[jax.Array], list[int | None]]:
    blocks, *per_sequence, kv_scale = operands
    if dims[-1] is not None:
        raise NotImplementedError(
            "cache_append under vmap must have one kv_scale for the mapped axis, got one for each "
            "index"
        )
    n = vmap.mapped_size(operands, dims)
    rows, block_table, positions, num_new = (
        vmap.fold(x, d, n) for x, d in zip(per_sequence, dims[1:-1], strict=True)
    )
    vmap.check_folded("cache_append", n, rows.shape[0] // n)
    blocks, block_table = vmap.fold_blocks(blocks, dims[0], block_table, n, format.block_shape)
    (blocks,) = append_op.bind(
        blocks,
        rows,
        block_table,
        positions,
        num_new,
        kv_scale,
        format=format,
        implementation=implementation,
    )
    return [vmap.unfold(blocks, n)], [0]


append_op = Operation(
    "cache_append",
    static=("format",),
    results=lambda blocks, *_, format: [(blocks.shape, blocks.dtype)],
    num_results=1,
    reference=lambda *operands, format: [reference(*operands, format=format)],
    batch=_batch,
    attributes=lambda *, format: {
        "format": np.int32(_limits.FORMATS[format.name]),
        "block_size": np.int32(format.block_size),
    },
    aliases={0: 0},
)
