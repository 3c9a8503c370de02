"""Two products that follow one another, as one call: the second reads its weights early."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jax_flashmla import _checks
from jax_flashmla._xla.operation import Operation
from jax_flashmla.ops.project import attributes, batch_rows, refusal_of_sizes
from jax_flashmla.reference.project import project_twice as reference


def project_twice(
    x: jax.Array,
    w: jax.Array,
    v: jax.Array,
    *,
    beside: jax.Array | None = None,
    transposed: bool = False,
    cos: jax.Array | None = None,
    sin: jax.Array | None = None,
    layout: str = "none",
    implementation: str | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """`project(project(x, w), v)`, where the first product's columns are shared out among heads.

    A step has two such pairs: the up-projection of queries and W_UK, W_UV and the output
    projection. As one call, the second product asks for its weights before the first one has ended.

    Args:
        x: [rows, groups, k], bfloat16, float16 or float32.
        w: [groups, k, n] of x's dtype; transposed: [groups, n, k].
        v: [heads, m, p] of x's dtype. The groups * n columns of the first product, which is rounded
            to x's dtype, are [heads, m + rope].
        beside: another weight of x, laid out as w, whose products are returned by themselves: what
            an indexer's queries are made with.
        transposed: whether the last axis of w is the one that is summed over.
        cos: [rows, rope / 2] float32, of the last rope columns of each head, as for `project`.
        sin: as cos.
        layout: as for `project`.
        implementation: as for `project`.

    Returns:
        y: [rows, heads, p + rope] in x's dtype.
        products: with `beside` alone, x times it [rows, groups, m] in x's dtype.

    Raises:
        ValueError, TypeError: a rank, shape, dtype or option that does not fit.
        NotImplementedError: "kernel" where there is none.
    """
    _checks.check_implementation(implementation)
    _checks.check_bool("transposed", transposed)
    rows, groups, k = _checks.check_array("x", x, "[rows, groups, k]", _checks.CACHE_DTYPES)
    dims = "[groups, n, k]" if transposed else "[groups, k, n]"
    shape = _checks.check_array("w", w, dims, _checks.CACHE_DTYPES)
    n = shape[1 if transposed else 2]
    if shape != ((groups, n, k) if transposed else (groups, k, n)):
        raise ValueError(
            f"w must be {dims} with x's groups = {groups} and k = {k}, got shape {shape}"
        )
    heads, m, _ = _checks.check_array("v", v, "[heads, m, p]", _checks.CACHE_DTYPES)
    for name, a in (("w", w), ("v", v)):
        if a.dtype != x.dtype:
            raise TypeError(f"{name} must have x's dtype {x.dtype}, got {a.dtype}")
    if heads == 0 or groups * n % heads or groups * n // heads < m:
        raise ValueError(
            f"v must be [heads, m, p] with heads that share out w's groups * n = {groups * n} "
            f"columns, at least m each, got shape {v.shape}"
        )
    rope = groups * n // heads - m
    _checks.check_layout(layout)
    if layout != "none" and rope % 2:
        raise ValueError(f"w must have an even number of columns behind v's m, got {rope} a head")
    cos, sin = _checks.as_rotation(cos, sin, layout, rope, (rows,), "[rows, pairs]")
    other = _check_beside(beside, x, shape, transposed)
    operands = (*map(jnp.asarray, (x, w, other, v)), cos, sin)
    if implementation is None and _refusal(*operands, transposed=transposed) is not None:
        implementation = "xla"
    y, products = project_twice_op(
        *operands, layout=layout, transposed=bool(transposed), implementation=implementation
    )
    return y if beside is None else (y, products)


def _check_beside(beside: Any, x: Any, shape: tuple[int, ...], transposed: bool) -> Any:
    """The other weight of x, of no columns where there is none; `shape` is w's."""
    axis = 1 if transposed else 2
    if beside is None:
        return jnp.zeros((*shape[:axis], 0, *shape[axis + 1 :]), x.dtype)
    dims = "[groups, m, k]" if transposed else "[groups, k, m]"
    got = _checks.check_array("beside", beside, dims, _checks.CACHE_DTYPES)
    if beside.dtype != x.dtype:
        raise TypeError(f"beside must have x's dtype {x.dtype}, got {beside.dtype}")
    if got[0] != shape[0] or got[3 - axis] != shape[3 - axis]:
        raise ValueError(
            f"beside must be {dims} with x's groups = {shape[0]} and k = {shape[3 - axis]}, got "
            f"shape {got}"
        )
    return beside


def _refusal(
    x: Any, w: Any, beside: Any, v: Any, *_: Any, transposed: bool, **__: Any
) -> str | None:
    """Why the Hopper kernels do not take the products; None where they do."""
    n, m = (a.shape[1 if transposed else 2] for a in (w, beside))
    columns = x.shape[1] * n // v.shape[0]
    return refusal_of_sizes(x, x.shape[2], [n, m], groups=x.shape[1]) or refusal_of_sizes(
        x, v.shape[1], [columns, v.shape[2]], groups=v.shape[0]
    )


def _results(
    x: Any, w: Any, beside: Any, v: Any, *_: Any, transposed: bool, **__: Any
) -> list[tuple[tuple[int, ...], Any]]:
    n, m = (a.shape[1 if transposed else 2] for a in (w, beside))
    between = x.shape[1] * n
    rope = between // v.shape[0] - v.shape[1]
    y = (x.shape[0], v.shape[0], v.shape[2] + rope)
    return [(y, x.dtype), ((*x.shape[:2], m), x.dtype), ((x.shape[0], between), x.dtype)]


project_twice_op: Operation = Operation(
    "project_twice",
    static=("layout", "transposed"),
    results=_results,
    num_results=2,
    reference=reference,
    batch=lambda operands, dims, **params: batch_rows(project_twice_op, operands, dims, params),
    attributes=attributes,
    refusal=_refusal,
    left_to_xla=("cpu",),
    made_of={1: (0, 2)},  # products: of x and beside
    chained=True,
)
