"""latent_append in pure JAX: norms and rotation in float32, then the rows of cache_append."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from jax_flashmla.cache.format import CacheFormat
from jax_flashmla.reference.append import cache_append

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Float32, Int32, Num


def latent_append(
    blocks: Num[Array, "num_blocks ..."],
    projected: Float[Array, "b s_new columns"],
    q_norm: Float[Array, "q_rank"],
    kv_norm: Float[Array, "kv_rank"],
    cos: Float32[Array, "b s_new pairs"],
    sin: Float32[Array, "b s_new pairs"],
    block_table: Int32[Array, "b max_blocks"],
    positions: Int32[Array, "b"],
    num_new: Int32[Array, "b"],
    kv_scale: Float32[Array, ""],
    *,
    format: CacheFormat,
    layout: str,
    q_eps: float,
    kv_eps: float,
    latent_scale: float,
) -> tuple[Num[Array, "num_blocks ..."], Float[Array, "b s_new q_rank"]]:
    q_rank, kv_rank = q_norm.shape[0], kv_norm.shape[0]
    q, latent, key = (
        projected[..., begin:end]
        for begin, end in (
            (0, q_rank),
            (q_rank, q_rank + kv_rank),
            (q_rank + kv_rank, q_rank + format.d_qk),
        )
    )
    latent = rms_norm(latent, kv_norm, kv_eps, latent_scale)
    rows = jnp.concatenate([latent, rotate(key, cos, sin, layout)], axis=-1).astype(format.dtype)
    updated = cache_append(
        blocks, rows[:, :, None], block_table, positions, num_new, kv_scale, format=format
    )
    return updated, rms_norm(q, q_norm, q_eps) if q_rank else q


def rms_norm(
    x: Float[Array, "*b n"], weight: Float[Array, "n"], eps: float, scale: float = 1.0
) -> Float[Array, "*b n"]:
    """scale * weight * x / sqrt(mean(x^2) + eps) over the last axis, in float32."""
    wide = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    normed = wide * jax.lax.rsqrt(mean_square + np.float32(eps))
    factor = weight.astype(jnp.float32) * np.float32(scale)
    return (normed * factor.reshape(*(1,) * (x.ndim - 1), -1)).astype(x.dtype)


def rotate(
    x: Float[Array, "*b rope"], cos: Float32[Array, "*#b pairs"], sin: Float32[Array, "*#b pairs"],
    layout: str,
) -> Float[Array, "*b rope"]:  # fmt: skip
    """x turned by the angles' cos and sin, in float32; the layouts are RopeConfig's."""
    if layout == "none":
        return x
    wide = x.astype(jnp.float32)
    if layout == "half":
        first, second = jnp.split(wide, 2, axis=-1)
    else:
        first, second = wide[..., 0::2], wide[..., 1::2]
    pair = first * cos - second * sin, second * cos + first * sin
    if layout == "interleaved":
        return jnp.stack(pair, axis=-1).reshape(x.shape).astype(x.dtype)
    return jnp.concatenate(pair, axis=-1).astype(x.dtype)
