"""project and project_twice in pure JAX: a matrix product per group, and a rotation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax.numpy as jnp

from jax_flashmla.reference.latent import rotate

if TYPE_CHECKING:
    from jaxtyping import Array, Float


def project(
    x: Float[Array, "rows groups columns"],
    *arrays: Float[Array, "..."],
    layout: str,
    transposed: bool,
) -> Float[Array, "rows groups _"]:
    """arrays: up to three weights, cos and sin [rows, pairs]."""
    *weights, cos, sin = arrays
    k = weights[0].shape[2 if transposed else 1]
    equation = "rgk,gnk->rgn" if transposed else "rgk,gkn->rgn"
    parts = [jnp.einsum(equation, x[..., :k], w) for w in weights if w.size]
    if k < x.shape[-1]:
        parts.append(rotate(x[..., k:], cos[:, None], sin[:, None], layout))
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)


def project_twice(
    x: Float[Array, "rows groups k"],
    w: Float[Array, "groups _ _"],
    v: Float[Array, "heads m p"],
    cos: Float[Array, "rows pairs"],
    sin: Float[Array, "rows pairs"],
    *,
    layout: str,
    transposed: bool,
) -> Float[Array, "rows heads _"]:
    none = cos[:, :0]
    between = project(x, w, none, none, layout="none", transposed=transposed)
    between = between.reshape(x.shape[0], v.shape[0], -1)
    return project(between, v, cos, sin, layout=layout, transposed=False)
