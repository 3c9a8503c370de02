"""From a token's down-projection to its cache row and query latent: norms, rotation, append."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_flashmla import _checks, _limits
from jax_flashmla._xla import vmap
from jax_flashmla._xla.operation import Operation, check_unsharded
from jax_flashmla.cache.format import CacheFormat, format_of_blocks
from jax_flashmla.ops.cache_append import unpack
from jax_flashmla.reference.latent import latent_append as reference

if TYPE_CHECKING:
    from jax.typing import ArrayLike


def latent_append(
    blocks: jax.Array,
    projected: jax.Array,
    kv_norm: jax.Array,
    cos: jax.Array | None,
    sin: jax.Array | None,
    block_table: jax.Array,
    positions: jax.Array,
    *,
    layout: str,
    q_norm: jax.Array | None = None,
    q_eps: float = 1e-6,
    kv_eps: float = 1e-6,
    latent_scale: float = 1.0,
    num_new: ArrayLike | None = None,
    cu_q_lens: jax.Array | None = None,
    format: CacheFormat | None = None,
    kv_scale: ArrayLike | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """Norms and rotates what a step's tokens are projected down to, and appends it to the cache.

    A row of `projected` is [query latent, latent, rotary key, anything else]. The cache row is
    `[RMSNorm(latent) * latent_scale, rotated key]`, each part rounded to projected's dtype, then to
    the format's, and stored as `cache_append` stores it: to the same places, in place where
    `blocks` is donated, and quantised where the format asks for it. Norms and rotation are in
    float32.

    Args:
        blocks: the cache, as for `cache_append`, with h_kv = 1.
        projected: [b, s_new, columns], bfloat16, float16 or float32; with cu_q_lens [T, columns].
            columns is at least q_rank + d_qk; what lies behind is not read.
        kv_norm: weight of the latent's norm [kv_rank], of any of these dtypes. The key has
            `format.d_qk - kv_rank` columns.
        cos: [b, s_new, pairs] float32 of each pair of the key's columns, with whatever scale the
            embedding has; with cu_q_lens [T, pairs]. None with layout "none".
        sin: as cos.
        block_table: block ids [b, max_blocks], int32.
        positions: token position [b] of each sequence's first new row in the cache, int32. It says
            where rows go; how far the key is turned, cos and sin say.
        layout: which columns make a pair: "interleaved", neighbours; "deinterleaved", neighbours,
            stored as all first ones, then all second ones; "half", column i and i + half; "none",
            nothing is rotated.
        q_norm: weight of the query latent's norm [q_rank], of kv_norm's dtype; None where rows
            begin with the latent.
        q_eps: epsilon of the query latent's norm.
        kv_eps: epsilon of the latent's norm.
        latent_scale: what the normed latent is multiplied by.
        num_new: as for `cache_append`.
        cu_q_lens: as for `cache_append`.
        format: as for `cache_append`.
        kv_scale: as for `cache_append`.
        implementation: as for `cache_append`.

    Returns:
        blocks: updated.
        q_latent: the normed query latents [b, s_new, q_rank] in projected's dtype, those of dropped
            rows too; with cu_q_lens [T, q_rank]; None without q_norm.

    Raises:
        ValueError, TypeError: a rank, shape, dtype or option that does not fit.
        NotImplementedError: "kernel" where there is none.
    """
    _checks.check_implementation(implementation)
    packed = cu_q_lens is not None
    dims = "[T, columns]" if packed else "[b, s_new, columns]"
    *rows, columns = _checks.check_array("projected", projected, dims, _checks.CACHE_DTYPES)
    if cu_q_lens is not None:
        cu_q_lens = _checks.as_cu_q_lens(cu_q_lens)
        b = cu_q_lens.shape[0] - 1
    else:
        b = rows[0]
        _checks.check_batch("projected", b)
    format = format_of_blocks(format, blocks)
    if format.h_kv != 1:
        raise ValueError(f"blocks must have h_kv = 1, got {format.h_kv}")
    _checks.check_layout(layout)
    kv_norm, q_norm = _check_norms(kv_norm, q_norm)
    q_rank, rope = q_norm.shape[0], format.d_qk - kv_norm.shape[0]
    if rope < 0 or (layout != "none" and rope % 2):
        raise ValueError(
            f"kv_norm must leave blocks' d_qk = {format.d_qk} a key of an even number of columns, "
            f"got shape {kv_norm.shape}"
        )
    if columns < q_rank + format.d_qk:
        raise ValueError(
            f"projected must end in at least q_rank + d_qk = {q_rank} + {format.d_qk} columns, got "
            f"shape {projected.shape}"
        )
    dims = "[T, pairs]" if packed else "[b, s_new, pairs]"
    cos, sin = _checks.as_rotation(cos, sin, layout, rope, tuple(rows), dims)
    block_table = _checks.as_block_table(block_table, b, format.block_size)
    positions = _checks.as_per_sequence("positions", positions, b)
    if num_new is None:
        num_new = jnp.full(b, rows[-1], jnp.int32)
    written = _checks.as_per_sequence("num_new", num_new, b)
    kv_scale = _checks.as_kv_scale(kv_scale, format.name)
    static = {
        "layout": layout,
        "q_eps": _checks.check_number("q_eps", q_eps, zero=True),
        "kv_eps": _checks.check_number("kv_eps", kv_eps, zero=True),
        "latent_scale": _checks.check_number("latent_scale", latent_scale),
    }
    projected = jnp.asarray(projected)
    if cu_q_lens is not None:
        table = (cu_q_lens, block_table, positions, written)
        check_unsharded("latent_append", tuple(map(jax.typeof, (projected, *table))))
        projected, block_table, positions, written = unpack(
            projected, *table, block_size=format.block_size
        )
        cos, sin = cos[:, None], sin[:, None]
    updated, q_latent = latent_op(
        blocks, projected, q_norm, kv_norm, cos, sin, block_table, positions, written, kv_scale,
        format=format, implementation=implementation, **static,
    )  # fmt: skip
    if q_rank == 0:
        return updated, None
    return updated, q_latent[:, 0] if packed else q_latent


def _check_norms(kv_norm: Any, q_norm: Any) -> tuple[jax.Array, jax.Array]:
    """Both weights; the query's is empty where there is none."""
    _checks.check_array("kv_norm", kv_norm, "[kv_rank]", _checks.CACHE_DTYPES)
    if q_norm is None:
        return jnp.asarray(kv_norm), jnp.zeros(0, kv_norm.dtype)
    _checks.check_array("q_norm", q_norm, "[q_rank]", _checks.CACHE_DTYPES)
    if q_norm.dtype != kv_norm.dtype:
        raise TypeError(f"q_norm must have kv_norm's dtype {kv_norm.dtype}, got {q_norm.dtype}")
    return jnp.asarray(kv_norm), jnp.asarray(q_norm)


def _results(
    blocks: Any, projected: Any, q_norm: Any, *_: Any, **__: Any
) -> list[tuple[tuple[int, ...], Any]]:
    q_latent = (*projected.shape[:2], q_norm.shape[0])
    return [(blocks.shape, blocks.dtype), (q_latent, projected.dtype)]


def _batch(
    operands: tuple[jax.Array, ...], dims: vmap.Dims, *, format: CacheFormat, **params: Any
) -> tuple[list[jax.Array], list[int]]:
    params["format"] = format
    if any(dims[i] is not None for i in (2, 3, 9)):  # weights, kv_scale
        return vmap.call_each(lambda *x: latent_op.bind(*x, **params), operands, dims), [0, 0]
    blocks, projected, q_norm, kv_norm, *rest, kv_scale = operands
    n = vmap.mapped_size(operands, dims)
    projected = vmap.fold(projected, dims[1], n)
    cos, sin, block_table, positions, num_new = (
        vmap.fold(x, d, n) for x, d in zip(rest, dims[4:-1], strict=True)
    )
    vmap.check_folded("latent_append", n, projected.shape[0] // n)
    blocks, block_table = vmap.fold_blocks(blocks, dims[0], block_table, n, format.block_shape)
    results = latent_op.bind(
        blocks, projected, q_norm, kv_norm, cos, sin, block_table, positions, num_new, kv_scale,
        **params,
    )  # fmt: skip
    return [vmap.unfold(x, n) for x in results], [0, 0]


def _attributes(
    *, format: CacheFormat, layout: str, q_eps: float, kv_eps: float, latent_scale: float
) -> dict[str, Any]:
    return {
        "format": np.int32(_limits.FORMATS[format.name]),
        "block_size": np.int32(format.block_size),
        "rows_dtype": np.int32(_limits.DTYPES[jnp.dtype(format.dtype).name]),
        "layout": np.int32(_limits.ROPE_LAYOUTS[layout]),
        "q_eps": np.float32(q_eps),
        "kv_eps": np.float32(kv_eps),
        "latent_scale": np.float32(latent_scale),
    }


latent_op = Operation(
    "latent_append",
    static=("format", "layout", "q_eps", "kv_eps", "latent_scale"),
    results=_results,
    num_results=2,
    reference=reference,
    batch=_batch,
    attributes=_attributes,
    aliases={0: 0},
    chained=True,
)
