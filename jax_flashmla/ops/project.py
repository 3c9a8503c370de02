"""Products of a few rows with weights that are read once: what a decoding step projects with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_flashmla import _checks, _limits
from jax_flashmla._xla import vmap
from jax_flashmla._xla.operation import Operation
from jax_flashmla.reference.project import project as reference


def project(
    x: jax.Array,
    w: jax.Array | Sequence[jax.Array],
    *,
    exact: jax.Array | None = None,
    transposed: bool = False,
    cos: jax.Array | None = None,
    sin: jax.Array | None = None,
    layout: str = "none",
    implementation: str | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Multiplies each group's rows with its weights: `y[:, g] = x[:, g, :k] @ w[g]`, for few rows.

    The weights are what takes the time: the Hopper kernel reads them once, at the memory's
    bandwidth, whatever their shape. Several weights of one x are one call; their products lie side
    by side. Sums are in float32.

    Columns of x behind the first k are not multiplied but rotated, and follow the products in y:
    with W_UK as weights, the queries of a step become those of latent attention in one call.

    Args:
        x: [rows, groups, k + rope], bfloat16, float16 or float32.
        w: [groups, k, n] of x's dtype; transposed: [groups, n, k]; or up to three of them.
        exact: one more weight [groups, k, m], float32, whose products are not rounded to x's dtype:
            what an indexer weighs its heads with. The Hopper kernel adds products of its bfloat16
            parts: where an infinity is multiplied, or a weight above 3.38e38, they are NaN.
        transposed: whether the last axis of w is the one that is summed over.
        cos: [rows, rope / 2] float32 of each pair of the columns to rotate, with whatever scale the
            embedding has; None with layout "none".
        sin: as cos.
        layout: which of the last rope columns make a pair, as for `latent_append`; "none" copies
            them.
        implementation: "kernel" insists on the handler; "xla" is the pure-JAX reference. None picks
            the best: on Hopper GPUs the handler for 16-bit floats of at most 128 rows, with
            extents that are multiples of 8.

    Returns:
        y: [rows, groups, n + rope] in x's dtype, n that of all weights.
        products: with `exact` alone, x's first k columns times it [rows, groups, m] float32.

    Raises:
        ValueError, TypeError: a rank, shape, dtype or option that does not fit.
        NotImplementedError: "kernel" where there is none.
    """
    _checks.check_implementation(implementation)
    _checks.check_bool("transposed", transposed)
    rows, groups, columns = _checks.check_array(
        "x", x, "[rows, groups, k + rope]", _checks.CACHE_DTYPES
    )
    weights = tuple(w) if isinstance(w, tuple | list) else (w,)
    rope = columns - _check_weights(x, weights, groups, columns, transposed)
    _checks.check_layout(layout)
    if layout != "none" and rope % 2:
        raise ValueError(f"x must have an even number of columns behind w's k, got {rope}")
    cos, sin = _checks.as_rotation(cos, sin, layout, rope, (rows,), "[rows, pairs]")
    empty = list(weights[0].shape)
    empty[1 if transposed else 2] = 0
    missing = [jnp.zeros(empty, x.dtype)] * (_limits.MAX_WEIGHTS - len(weights))
    wide = _check_exact(exact, groups, columns - rope)
    operands = (jnp.asarray(x), *map(jnp.asarray, weights), *missing, wide, cos, sin)
    if implementation is None and _refusal(*operands, transposed=transposed) is not None:
        implementation = "xla"
    y, products = project_op(
        *operands, layout=layout, transposed=bool(transposed), implementation=implementation
    )
    return y if exact is None else (y, products)


def _check_exact(exact: Any, groups: int, k: int) -> jax.Array:
    """The float32 weight, of no columns where there is none."""
    if exact is None:
        return jnp.zeros((groups, k, 0), jnp.float32)
    shape = _checks.check_array("exact", exact, "[groups, k, m]", (np.dtype(np.float32),))
    if shape[:2] != (groups, k):
        raise ValueError(
            f"exact must be [groups, k, m] with x's groups = {groups} and w's k = {k}, got shape "
            f"{shape}"
        )
    return jnp.asarray(exact)


def _check_weights(
    x: Any, weights: tuple[Any, ...], groups: int, columns: int, transposed: bool
) -> int:
    """The k of all weights."""
    if not 1 <= len(weights) <= _limits.MAX_WEIGHTS:
        raise ValueError(
            f"w must be an array or 1 to {_limits.MAX_WEIGHTS} of them, got {len(weights)}"
        )
    dims = "[groups, n, k]" if transposed else "[groups, k, n]"
    axis, k = 2 if transposed else 1, 0
    for w in weights:
        shape = _checks.check_array("w", w, dims, _checks.CACHE_DTYPES)
        k = k or shape[axis]
        if w.dtype != x.dtype:
            raise TypeError(f"w must have x's dtype {x.dtype}, got {w.dtype}")
        if shape[0] != groups or k > columns or shape[axis] != k:
            raise ValueError(
                f"w must be {dims} with x's groups = {groups} and one k of at most its {columns} "
                f"columns, got shape {shape}"
            )
    return k


def _sizes(x: Any, weights: Sequence[Any], transposed: bool) -> tuple[int, list[int]]:
    """k, and n of each weight."""
    return weights[0].shape[2 if transposed else 1], [
        w.shape[1 if transposed else 2] for w in weights
    ]


def _refusal(x: Any, *arrays: Any, transposed: bool, **__: Any) -> str | None:
    """Why the Hopper kernel does not take a product; None where it does."""
    k, n = _sizes(x, arrays[:-3], transposed)
    exact_n, groups = arrays[-3].shape[2], x.shape[1]
    if exact_n and groups * -(-x.shape[0] // _limits.EXACT_ROWS) > _limits.MAX_PROJECT_GROUPS:
        return (
            f"the sm90 kernel of project takes with exact at most {_limits.MAX_PROJECT_GROUPS} "
            f"groups of {_limits.EXACT_ROWS} rows, got {groups} of {x.shape[0]}"
        )
    return refusal_of_sizes(x, k, [*n, x.shape[2], exact_n], groups=groups)


def refusal_of_sizes(x: Any, k: int, columns: Sequence[int], *, groups: int) -> str | None:
    """The same of a product by its sizes: columns are those of its weights, and of x's rows."""
    if x.dtype not in _checks.CACHE_DTYPES[:2]:
        return f"the sm90 kernel of project takes 16-bit floats, got {x.dtype}"
    if x.shape[0] > _limits.MAX_PROJECT_ROWS or groups > _limits.MAX_PROJECT_GROUPS:
        return (
            f"the sm90 kernel of project takes at most {_limits.MAX_PROJECT_ROWS} rows and "
            f"{_limits.MAX_PROJECT_GROUPS} groups, got {x.shape[0]} and {groups}"
        )
    if any(size % 8 for size in (k, *columns)):  # TMA takes strides of 16 bytes
        return (
            "the sm90 kernel of project takes k, n and rope of a multiple of 8 columns, got "
            f"k = {k} and {list(columns)} columns"
        )
    return None


def _results(
    x: Any, *arrays: Any, transposed: bool, **__: Any
) -> list[tuple[tuple[int, ...], Any]]:
    *weights, exact, _, _ = arrays
    k, n = _sizes(x, weights, transposed)
    return [
        ((*x.shape[:2], sum(n) + x.shape[2] - k), x.dtype),
        ((*x.shape[:2], exact.shape[2]), jnp.float32),
    ]


def batch_rows(
    op: Operation, operands: tuple[jax.Array, ...], dims: vmap.Dims, params: dict[str, Any]
) -> tuple[list[jax.Array], list[int]]:
    """vmap of x, weights, cos and sin: more rows, or a call each where weights are mapped."""
    if any(d is not None for d in dims[1:-2]):
        results = vmap.call_each(lambda *x: op.bind(*x, **params), operands, dims)
    else:
        n = vmap.mapped_size(operands, dims)
        x, *weights, cos, sin = operands
        x, cos, sin = (
            vmap.fold(a, d, n) for a, d in ((x, dims[0]), (cos, dims[-2]), (sin, dims[-1]))
        )
        results = [vmap.unfold(y, n) for y in op.bind(x, *weights, cos, sin, **params)]
    return results, [0] * len(results)


def attributes(*, layout: str, transposed: bool) -> dict[str, Any]:
    """The handler's."""
    return {"transposed": transposed, "layout": np.int32(_limits.ROPE_LAYOUTS[layout])}


project_op: Operation = Operation(
    "project",
    static=("layout", "transposed"),
    results=_results,
    num_results=2,
    reference=reference,
    batch=lambda operands, dims, **params: batch_rows(project_op, operands, dims, params),
    attributes=attributes,
    refusal=_refusal,
    left_to_xla=("cpu",),
    made_of={1: (0, 1 + _limits.MAX_WEIGHTS)},  # products: of x and exact
    chained=True,
)
