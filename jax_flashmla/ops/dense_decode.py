"""Attention over a paged latent cache."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_flashmla import _checks, _limits
from jax_flashmla._context import Context, as_context
from jax_flashmla._decode_refusal import sm90_refusal
from jax_flashmla._num_parts import default_split
from jax_flashmla._windows import Windows, make_windows, window_tokens
from jax_flashmla._xla import vmap
from jax_flashmla._xla.operation import Operation, check_unsharded
from jax_flashmla.cache.format import CacheFormat, format_of_blocks
from jax_flashmla.ops.make_schedule import (
    SplitSchedule,
    check_schedule,
    schedule_of_lengths,
    schedule_op,
)
from jax_flashmla.reference.attention import dense_decode as reference

if TYPE_CHECKING:
    from jax.typing import ArrayLike


def dense_decode(
    q: jax.Array,
    blocks: jax.Array,
    block_table: jax.Array,
    cache_seqlens: jax.Array,
    *,
    d_v: int = 512,
    sm_scale: float | None = None,
    causal: bool = False,
    cu_q_lens: jax.Array | None = None,
    max_q_len: int | None = None,
    format: CacheFormat | None = None,
    kv_scale: ArrayLike | None = None,
    context: tuple[ArrayLike, int] | None = None,
    schedule: SplitSchedule | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Multi-head latent attention of a few queries per sequence over a paged cache.

    `out = softmax(sm_scale * q . keys) . values` with float32 accumulation. A cache row is a key,
    and its first d_v columns are the value; query head h reads cache head h // (h_q // h_kv). The
    same inputs give the same bits on the same device. Where the schedule cuts a sequence, the
    Hopper kernel rounds each piece's result to 11 bits before it merges them; a bfloat16 has 8.

    With `cu_q_lens` the queries of a ragged batch are packed: sequence i has the tokens from
    cu_q_lens[i] to cu_q_lens[i + 1], from none to a whole prompt. Tokens are attended in groups
    that fill a tile of 64 query rows and read the cache together. A token of no sequence is padding
    and may hold anything: out is 0 and lse -inf there.

    Args:
        q: [b, s_q, h_q, d_qk] bfloat16, float16 or float32; b at most 16384, and b * s_q * h_q
            below 2^31. The Hopper kernel takes no float32. With cu_q_lens [T, h_q, d_qk].
        blocks: [num_blocks, block_size, h_kv, d_qk] in q's dtype; h_kv divides h_q. With a format
            [num_blocks, *format.block_shape] in its storage_dtype.
        block_table: [b, max_blocks] int32, each sequence's blocks in order. Entries past a
            sequence's length are never used; a block id outside [0, num_blocks) reads as zeros.
        cache_seqlens: [b] int32, tokens valid in each sequence's cache, the new ones included;
            clamped to [0, max_blocks * block_size]. Slots past the length may hold anything.
        d_v: columns of a value, at most d_qk.
        sm_scale: scale of the scores, finite and positive; by default d_qk ** -0.5.
        causal: query i sees keys below cache_seqlens - (s_q - 1 - i), where s_q is, with cu_q_lens,
            the number of the sequence's own tokens: its queries are its cache's last tokens.
        cu_q_lens: [b + 1] int32, ascending bounds of each sequence's packed tokens. Values are
            clamped to [0, T], and to the one before where they decrease.
        max_q_len: with cu_q_lens, the most tokens that a sequence has (static), T by default; 1
            says that this step only decodes. Tokens past a sequence's first max_q_len are padding.
        format: how blocks are stored: "dense" (also with rows wider than d_qk), "v32" or "fp8_row";
            by default dense, as the array is.
        kv_scale: [] float32, what the codes of an "fp8_row" cache are multiplied with; by default
            1.
        context: (rank, size) where only the tokens rank, rank + size, rank + 2 size ... of each
            sequence are here, and token j of block_table's has position j * size + rank; size is
            static. cache_seqlens and causal are of whole sequences, the results of the tokens that
            are here: `jax_flashmla.context` merges those of all ranks.
        schedule: the step's schedule from `make_schedule`, which is given context too, and for
            packed queries cu_q_lens, max_q_len and causal; made here by default (and once only in a
            jitted step: XLA merges equal ones).
        implementation: None for the platform's best, "kernel" to insist on the handler, "xla" for
            pure JAX, which can be differentiated.

    Returns:
        out: [b, s_q, h_q, d_v] in q's dtype, 0 in a row with nothing to attend; [T, h_q, d_v] with
            cu_q_lens.
        lse: [b, s_q, h_q] float32, natural log; -inf in a row with nothing to attend; [T, h_q] with
            cu_q_lens.

    Raises:
        TypeError, ValueError: an argument is not as described.
        NotImplementedError: implementation is "kernel" and there is none for this platform, device
            or these dimensions; or the kernel is differentiated.
    """
    if cu_q_lens is None:
        b, s_q, h_q, d_qk = _checks.check_query(q)
        _checks.check_batch("q", b)
        if max_q_len is not None:
            raise ValueError(f"max_q_len must be None without cu_q_lens, got {max_q_len}")
    else:
        num_tokens, h_q, d_qk = _checks.check_packed_query(q)
        cu_q_lens = _checks.as_cu_q_lens(cu_q_lens)
        b = cu_q_lens.shape[0] - 1
        longest = _checks.as_max_q_len(max_q_len, num_tokens)
    d_v = _checks.check_int("d_v", d_v, 1, _limits.INT32_MAX)
    if d_v > d_qk:
        raise ValueError(
            f"d_v must be at most d_qk = {d_qk} (a value is a row's first d_v columns), got {d_v}"
        )
    format = format_of_blocks(format, blocks)
    if format.name not in DECODE_FORMATS:
        raise ValueError(
            f"format must be {_checks.one_of(DECODE_FORMATS)} for dense_decode, got {format.name}"
        )
    if q.dtype != format.dtype:
        raise TypeError(f"blocks must have q's dtype {q.dtype}, got {format.dtype}")
    if d_qk != format.d_qk:
        raise ValueError(
            f"blocks must have rows of q's d_qk = {d_qk}, got {format.d_qk} in shape {blocks.shape}"
        )
    if h_q % format.h_kv:
        raise ValueError(
            f"q's h_q must be a multiple of blocks' h_kv = {format.h_kv}, got h_q = {h_q}"
        )
    block_table = _checks.as_block_table(block_table, b, format.block_size)
    cache_seqlens = _checks.as_per_sequence("cache_seqlens", cache_seqlens, b)
    _checks.check_bool("causal", causal)
    if sm_scale is not None:
        _checks.check_number("sm_scale", sm_scale)
    kv_scale = _checks.as_kv_scale(kv_scale, format.name)
    here = as_context(context)
    _checks.check_implementation(implementation)
    params: dict[str, Any] = {
        "kv_scale": kv_scale,
        "format": format,
        "d_v": d_v,
        "sm_scale": float(d_qk**-0.5 if sm_scale is None else sm_scale),
        "causal": bool(causal),
        "context": here,
        "schedule": schedule,
        "implementation": implementation,
    }
    if cu_q_lens is None:
        return _decode(q, blocks, block_table, cache_seqlens, **params)
    return decode_packed(
        q, blocks, block_table, cache_seqlens, cu_q_lens, max_q_len=longest, **params
    )


def decode_packed(
    q: jax.Array,
    blocks: jax.Array,
    block_table: jax.Array,
    cache_seqlens: jax.Array,
    cu_q_lens: jax.Array,
    *,
    format: CacheFormat,
    max_q_len: int,
    causal: bool,
    context: Context | None = None,
    **params: Any,
) -> tuple[jax.Array, jax.Array]:
    """dense_decode of packed queries, past the checks on arguments.

    Dense blocks with h_kv = 1 may be an engine's pages [pages, page_size / pack, pack, row_stride]:
    XLA copies what is reshaped to blocks, as it may lay it out otherwise.
    """
    check_unsharded("dense_decode", tuple(map(jax.typeof, (q, cu_q_lens, cache_seqlens))))
    num_tokens, h_q, _ = q.shape
    capacity = block_table.shape[1] * format.block_size
    if context is not None:
        cache_seqlens = context.clamp(cache_seqlens, capacity)
        capacity = _limits.INT32_MAX
    windows = make_windows(
        cu_q_lens,
        cache_seqlens,
        num_tokens=num_tokens,
        s_q=window_tokens(h_q, format.h_kv, max_q_len),
        max_q_len=max_q_len,
        capacity=capacity,
        causal=causal,
    )
    q, block_table = _unpack(windows, q, block_table)
    out, lse = _decode(
        q,
        blocks,
        block_table,
        windows.cache_seqlens,
        format=format,
        causal=causal,
        context=context,
        made_for=f"q's T = {num_tokens} packed tokens (cu_q_lens, num_tokens, max_q_len)",
        **params,
    )
    return _pack(windows, out, lse)


def _decode(
    q: jax.Array,
    blocks: jax.Array,
    block_table: jax.Array,
    cache_seqlens: jax.Array,
    *,
    kv_scale: jax.Array,
    format: CacheFormat,
    causal: bool,
    context: Context | None,
    schedule: SplitSchedule | None,
    implementation: str | None,
    made_for: str | None = None,
    **params: Any,
) -> tuple[jax.Array, jax.Array]:
    b, s_q, h_q, _ = q.shape
    capacity = block_table.shape[1] * format.block_size
    if context is not None:
        lengths = context.clamp(cache_seqlens, capacity)
        cache_seqlens = context.count(lengths)
    if context is None or not causal or s_q == 1:
        seen = cache_seqlens[:, None]  # causal tells it
    elif format.name == "dense":
        seen = context.seen(lengths, s_q)
    else:  # whose kernels take no `seen`: each query token is a sequence
        lengths = context.seen(lengths, s_q).reshape(b * s_q)
        each = q.reshape(b * s_q, 1, *q.shape[2:])
        out, lse = _decode(
            each, blocks, jnp.repeat(block_table, s_q, axis=0), lengths, kv_scale=kv_scale,
            format=format, causal=False, context=None, schedule=None,
            implementation=implementation, **params,
        )  # fmt: skip
        return out.reshape(b, s_q, *out.shape[2:]), lse.reshape(b, s_q, -1)
    if schedule is None:
        schedule = schedule_of_lengths(
            cache_seqlens,
            h_q=h_q,
            h_kv=format.h_kv,
            s_q=s_q,
            max_seqlen=capacity,
            format=format,
            implementation=implementation,
        )
    schedule = check_schedule(schedule, b, made_for)
    out, lse = decode_op(
        q,
        blocks,
        block_table,
        cache_seqlens,
        seen,
        schedule.cuts,
        kv_scale,
        format=format,
        causal=causal,
        tile_rows=schedule.tile_rows,
        implementation=implementation,
        **params,
    )
    return out, lse


@functools.partial(jax.jit, inline=True)
def _unpack(windows: Windows, q: jax.Array, block_table: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Queries and table of a batch with a sequence for each window."""
    return windows.unpack(q), block_table[windows.sequence]


@functools.partial(jax.jit, inline=True)
def _pack(windows: Windows, out: jax.Array, lse: jax.Array) -> tuple[jax.Array, jax.Array]:
    return windows.pack(out, 0.0), windows.pack(lse, -jnp.inf)


DECODE_FORMATS = ("dense", "v32", "fp8_row")


def _refusal(q: Any, *_: Any, format: CacheFormat, d_v: int, **__: Any) -> str | None:
    return sm90_refusal(q.shape[-1], d_v, q.dtype, format)


def _results(q: Any, *operands: Any, d_v: int, **_: Any) -> list[tuple[tuple[int, ...], Any]]:
    rows, cuts = q.shape[:-1], operands[4]
    pieces = (2 * (cuts.shape[0] - 1), *rows[1:])
    return [
        ((*rows, d_v), q.dtype),
        (rows, jnp.float32),
        ((*pieces, d_v), jnp.float32),  # workspace
        (pieces, jnp.float32),  # workspace
    ]


def _reference(
    q: jax.Array,
    blocks: jax.Array,
    block_table: jax.Array,
    cache_seqlens: jax.Array,
    seen: jax.Array,
    cuts: jax.Array,
    kv_scale: jax.Array,
    *,
    tile_rows: int,
    **params: Any,
) -> tuple[jax.Array, jax.Array]:
    del cuts, tile_rows  # how work is divided changes nothing
    return reference(q, blocks, block_table, cache_seqlens, seen, kv_scale, **params)


def _batch(
    operands: tuple[jax.Array, ...],
    dims: vmap.Dims,
    *,
    format: CacheFormat,
    tile_rows: int,
    implementation: str | None,
    **params: Any,
) -> tuple[list[jax.Array], list[int | None]]:
    q, blocks, block_table, cache_seqlens, seen, cuts, kv_scale = operands
    q_dim, blocks_dim, table_dim, seqlens_dim, seen_dim, cuts_dim, scale_dim = dims
    params = {"format": format, "implementation": implementation, **params}
    if scale_dim is not None:
        raise NotImplementedError(
            "dense_decode under vmap must have one kv_scale for the mapped axis, got one for each "
            "index: map over the caller's own loop instead"
        )
    n = vmap.mapped_size(operands, dims)
    if all(d is None for d in dims[:5]):  # no schedule changes what is computed
        assert cuts_dim is not None
        cuts = jax.lax.index_in_dim(cuts, 0, cuts_dim, keepdims=False)
        results = decode_op.bind(*operands[:5], cuts, kv_scale, tile_rows=tile_rows, **params)
        return results, [None] * 4
    q, block_table, cache_seqlens = (
        vmap.fold(q, q_dim, n),
        vmap.fold(block_table, table_dim, n),
        vmap.fold(cache_seqlens, seqlens_dim, n),
    )
    seen = vmap.fold(seen, seen_dim, n)
    b = q.shape[0] // n
    vmap.check_folded("dense_decode", n, b)
    if blocks_dim is not None:
        blocks, block_table = vmap.fold_blocks(
            blocks, blocks_dim, block_table, n, format.block_shape
        )
    # n small problems may be a large one, which wants a schedule of its own.
    num_parts, tile_rows = default_split(
        b=n * b,
        s_q=q.shape[1],
        h_q=q.shape[2],
        h_kv=format.h_kv,
        max_seqlen=block_table.shape[1] * format.block_size,
        format=format.name,
    )
    (cuts,) = schedule_op.bind(cache_seqlens, num_parts=num_parts, implementation=implementation)
    out, lse, *workspace = decode_op.bind(
        q, blocks, block_table, cache_seqlens, seen, cuts, kv_scale, tile_rows=tile_rows, **params
    )
    return [vmap.unfold(out, n), vmap.unfold(lse, n), *workspace], [0, 0, None, None]


def _attributes(
    *, sm_scale: float, causal: bool, format: CacheFormat, tile_rows: int, **_: Any
) -> dict[str, Any]:
    return {
        "sm_scale": np.float32(sm_scale),
        "causal": bool(causal),
        "format": np.int32(_limits.FORMATS[format.name]),
        "block_size": np.int32(format.block_size),
        "h_kv": np.int32(format.h_kv),
        "tile_rows": np.int32(tile_rows),
    }


decode_op = Operation(
    "dense_decode",
    static=("d_v", "sm_scale", "causal", "format", "tile_rows"),
    results=_results,
    num_results=2,
    reference=_reference,
    batch=_batch,
    attributes=_attributes,
    refusal=_refusal,
    chained=True,
)
