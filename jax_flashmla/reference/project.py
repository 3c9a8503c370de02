"""project and project_twice in pure JAX: a matrix product per group, and a rotation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax.numpy as jnp

from jax_flashmla.reference.latent import rotate

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Array, Float, Float32


def project(
    x: Float[Array, "rows groups columns"],
    *arrays: Float[Array, "..."],
    layout: str,
    transposed: bool,
) -> tuple[Float[Array, "rows groups _"], Float32[Array, "rows groups _"]]:
    """arrays: up to three weights, the float32 one, cos and sin [rows, pairs]."""
    *weights, exact, cos, sin = arrays
    products = multiply_exactly(x[..., : exact.shape[1]], exact)
    return multiply(x, weights, cos, sin, layout=layout, transposed=transposed), products


def multiply_exactly(
    x: Float[Array, "rows groups k"], w: Float32[Array, "groups k n"]
) -> Float32[Array, "rows groups n"]:
    """Their product in float32, of which GPUs would keep fewer bits otherwise."""
    return jnp.einsum("rgk,gkn->rgn", x.astype(jnp.float32), w, precision="highest")


def multiply(
    x: Float[Array, "rows groups columns"],
    weights: Sequence[Float[Array, "groups _ _"]],
    cos: Float[Array, "rows pairs"],
    sin: Float[Array, "rows pairs"],
    *,
    layout: str,
    transposed: bool,
) -> Float[Array, "rows groups _"]:
    """The products side by side, and the columns that are rotated behind them."""
    k = weights[0].shape[2 if transposed else 1]
    equation = "rgk,gnk->rgn" if transposed else "rgk,gkn->rgn"
    parts = [jnp.einsum(equation, x[..., :k], w) for w in weights]
    if k < x.shape[-1]:
        parts.append(rotate(x[..., k:], cos[:, None], sin[:, None], layout))
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)


def project_twice(
    x: Float[Array, "rows groups k"],
    w: Float[Array, "groups _ _"],
    beside: Float[Array, "groups _ _"],
    v: Float[Array, "heads m p"],
    cos: Float[Array, "rows pairs"],
    sin: Float[Array, "rows pairs"],
    *,
    layout: str,
    transposed: bool,
) -> tuple[Float[Array, "rows heads _"], Float[Array, "rows groups _"]]:
    none = cos[:, :0]
    between, products = (
        multiply(x, [a], none, none, layout="none", transposed=transposed) for a in (w, beside)
    )
    between = between.reshape(x.shape[0], v.shape[0], -1)
    return multiply(between, [v], cos, sin, layout=layout, transposed=False), products
