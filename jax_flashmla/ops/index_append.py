"""From projections to index keys in the cache and index queries: norm, rotation, quantisation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_flashmla import _checks, _limits
from jax_flashmla._xla import vmap
from jax_flashmla._xla.operation import Operation
from jax_flashmla.cache.format import CacheFormat, format_of_blocks
from jax_flashmla.reference.index_append import index_append as reference

if TYPE_CHECKING:
    from jax.typing import ArrayLike


def index_append(
    blocks: jax.Array,
    projected: jax.Array,
    k_norm: jax.Array,
    k_bias: jax.Array,
    cos: jax.Array | None,
    sin: jax.Array | None,
    block_table: jax.Array,
    positions: jax.Array,
    *,
    format: CacheFormat,
    layout: str,
    q: jax.Array | None = None,
    weights: jax.Array | None = None,
    weight_scale: float = 1.0,
    eps: float = 1e-6,
    hadamard: bool = True,
    num_new: ArrayLike | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """Norms, rotates and quantises a step's index keys into the cache, and its index queries.

    A key is `LayerNorm(raw) * k_norm + k_bias`. Its first columns are rotated, as attention's last
    ones are; it is multiplied with a Hadamard matrix of 1 and -1 and 128^-0.5, which spreads
    outliers over all columns; and it is stored as `cache_append` stores it, in place where `blocks`
    is donated. Queries are rotated and multiplied likewise, and quantised as keys are. Each of
    these is in float32, its result rounded to projected's dtype.

    Args:
        blocks: the index pool's blocks, uint8, as for `cache_append`.
        projected: [b, s_new, columns], bfloat16, float16 or float32. The last 128 columns are the
            raw key; what lies before them is not read.
        k_norm: weight of the key's LayerNorm [128], of any of these dtypes.
        k_bias: its bias [128], of k_norm's dtype.
        cos: [b, s_new, pairs] float32 of each pair of the first 2 * pairs columns, at most 64, with
            whatever scale the embedding has. None with layout "none".
        sin: as cos.
        block_table: as for `latent_append`, and so are positions.
        positions: where rows go.
        format: "fp8_index".
        layout: which columns make a pair, as for `latent_append`.
        q: raw index queries [b, s_new, heads, 128], of projected's dtype; None for keys alone.
        weights: with q, each head's weight [b, s_new, heads] float32.
        weight_scale: what weights are multiplied by.
        eps: epsilon of the LayerNorm.
        hadamard: whether to multiply with the Hadamard matrix.
        num_new: as for `cache_append`.
        implementation: as for `cache_append`.

    Returns:
        blocks: updated.
        codes: the queries as `index_topk` takes them [b, s_new, heads, 128] float8_e4m3fn, those of
            dropped rows too; None without q.
        scaled: weights * weight_scale * scales of codes [b, s_new, heads] float32; None without q.

    Raises:
        ValueError, TypeError: a rank, shape, dtype or option that does not fit.
        NotImplementedError: "kernel" where there is none.
    """
    _checks.check_implementation(implementation)
    dims = "[b, s_new, columns]"
    b, s_new, columns = _checks.check_array("projected", projected, dims, _checks.CACHE_DTYPES)
    _checks.check_batch("projected", b)
    format = format_of_blocks(format, blocks)
    if format.name != "fp8_index":
        raise ValueError(f'format must be "fp8_index", got {format}')
    d = format.d_qk
    if columns < d:
        raise ValueError(
            f"projected must end in an index key of {d} columns, got shape {projected.shape}"
        )
    k_norm, k_bias = _check_norm(d, k_norm, k_bias)
    _checks.check_layout(layout)
    cos, sin = _check_angles(d, cos, sin, layout, (b, s_new))
    q, weights, has_q = _check_queries(projected, d, q, weights)
    block_table = _checks.as_block_table(block_table, b, format.block_size)
    positions = _checks.as_per_sequence("positions", positions, b)
    if num_new is None:
        num_new = jnp.full(b, s_new, jnp.int32)
    num_new = _checks.as_per_sequence("num_new", num_new, b)
    _checks.check_bool("hadamard", hadamard)
    updated, codes, scaled = index_append_op(
        blocks, jnp.asarray(projected), k_norm, k_bias, cos, sin, q, weights, block_table,
        positions, num_new, format=format, layout=layout,
        eps=_checks.check_number("eps", eps, zero=True), hadamard=bool(hadamard),
        weight_scale=_checks.check_number("weight_scale", weight_scale),
        implementation=implementation,
    )  # fmt: skip
    return (updated, codes, scaled) if has_q else (updated, None, None)


def _check_norm(d: int, k_norm: Any, k_bias: Any) -> tuple[jax.Array, jax.Array]:
    for name, x in (("k_norm", k_norm), ("k_bias", k_bias)):
        _checks.check_array(name, x, "[d]", _checks.CACHE_DTYPES)
        if x.shape != (d,):
            raise ValueError(f"{name} must have shape ({d},), got {tuple(x.shape)}")
    if k_bias.dtype != k_norm.dtype:
        raise TypeError(f"k_bias must have k_norm's dtype {k_norm.dtype}, got {k_bias.dtype}")
    return jnp.asarray(k_norm), jnp.asarray(k_bias)


def _check_angles(
    d: int, cos: Any, sin: Any, layout: str, rows: tuple[int, int]
) -> tuple[jax.Array, jax.Array]:
    """Both of them; empty where nothing is rotated."""
    dims, pairs = "[b, s_new, pairs]", 0
    if layout != "none":
        pairs = _checks.check_array("cos", cos, dims, (np.dtype(np.float32),))[-1]
    if 2 * pairs > d:
        raise ValueError(f"cos must have at most {d // 2} pairs, got shape {cos.shape}")
    return _checks.as_rotation(cos, sin, layout, 2 * pairs, rows, dims)


def _check_queries(
    projected: Any, d: int, q: Any, weights: Any
) -> tuple[jax.Array, jax.Array, bool]:
    """Queries and weights, of no heads where there are none; and whether there are."""
    b, s_new, _ = projected.shape
    if (q is None) != (weights is None):
        raise TypeError(
            f"weights must be given with q, and None without, got {_checks.describe(weights)}"
        )
    if q is None:
        q, weights = jnp.zeros((b, s_new, 0, d), projected.dtype), jnp.zeros((b, s_new, 0))
        return q, weights.astype(jnp.float32), False
    shape = _checks.check_array("q", q, "[b, s_new, heads, d]", _checks.CACHE_DTYPES)
    if q.dtype != projected.dtype:
        raise TypeError(f"q must have projected's dtype {projected.dtype}, got {q.dtype}")
    if shape != (b, s_new, shape[2], d):
        raise ValueError(f"q must have shape ({b}, {s_new}, heads, {d}), got {shape}")
    got = _checks.check_array("weights", weights, "[b, s_new, heads]", (np.dtype(np.float32),))
    if got != shape[:3]:
        raise ValueError(f"weights must have shape {shape[:3]}, got {got}")
    return jnp.asarray(q), jnp.asarray(weights), True


def _results(
    blocks: Any, projected: Any, k_norm: Any, k_bias: Any, cos: Any, sin: Any, q: Any, *_: Any,
    **__: Any,
) -> list[tuple[tuple[int, ...], Any]]:  # fmt: skip
    return [
        (blocks.shape, blocks.dtype), (q.shape, jnp.float8_e4m3fn), (q.shape[:3], jnp.float32),
    ]  # fmt: skip


def _batch(
    operands: tuple[jax.Array, ...], dims: vmap.Dims, *, format: CacheFormat, **params: Any
) -> tuple[list[jax.Array], list[int]]:
    params["format"] = format
    if dims[2] is not None or dims[3] is not None:  # k_norm, k_bias
        return vmap.call_each(
            lambda *x: index_append_op.bind(*x, **params), operands, dims
        ), [0, 0, 0]  # fmt: skip
    n = vmap.mapped_size(operands, dims)
    blocks, projected, k_norm, k_bias, *rest = operands
    projected, cos, sin, q, weights, block_table, positions, num_new = (
        vmap.fold(x, d, n)
        for x, d in zip((projected, *rest), (dims[1], *dims[4:]), strict=True)
    )  # fmt: skip
    vmap.check_folded("index_append", n, projected.shape[0] // n)
    blocks, block_table = vmap.fold_blocks(blocks, dims[0], block_table, n, format.block_shape)
    results = index_append_op.bind(
        blocks, projected, k_norm, k_bias, cos, sin, q, weights, block_table, positions, num_new,
        **params,
    )  # fmt: skip
    return [vmap.unfold(x, n) for x in results], [0, 0, 0]


def _attributes(
    *, format: CacheFormat, layout: str, eps: float, hadamard: bool, weight_scale: float
) -> dict[str, Any]:
    return {
        "block_size": np.int32(format.block_size),
        "layout": np.int32(_limits.ROPE_LAYOUTS[layout]),
        "hadamard": hadamard,
        "eps": np.float32(eps),
        "weight_scale": np.float32(weight_scale),
    }


index_append_op = Operation(
    "index_append",
    static=("format", "layout", "eps", "hadamard", "weight_scale"),
    results=_results,
    num_results=3,
    reference=reference,
    batch=_batch,
    attributes=_attributes,
    aliases={0: 0},
    chained=True,
)
