"""index_append in pure JAX: norm, rotation and Hadamard matrix, then the rows of cache_append."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from jax_flashmla.cache.format import CacheFormat
from jax_flashmla.cache.quantise import quantise
from jax_flashmla.reference.append import cache_append
from jax_flashmla.reference.latent import rotate

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Float8e4m3fn, Float32, Int32, UInt8


def index_append(
    blocks: UInt8[Array, "num_blocks bytes"],
    projected: Float[Array, "b s_new columns"],
    k_norm: Float[Array, "d"],
    k_bias: Float[Array, "d"],
    cos: Float32[Array, "b s_new pairs"],
    sin: Float32[Array, "b s_new pairs"],
    q: Float[Array, "b s_new heads d"],
    weights: Float32[Array, "b s_new heads"],
    block_table: Int32[Array, "b max_blocks"],
    positions: Int32[Array, "b"],
    num_new: Int32[Array, "b"],
    *,
    format: CacheFormat,
    layout: str,
    eps: float,
    hadamard: bool,
    weight_scale: float,
) -> tuple[
    UInt8[Array, "num_blocks bytes"],
    Float8e4m3fn[Array, "b s_new heads d"],
    Float32[Array, "b s_new heads"],
]:
    keys = layer_norm(projected[..., -format.d_qk :], k_norm, k_bias, eps)[:, :, None]
    angles = cos[:, :, None], sin[:, :, None]
    keys, q = (turn(x, *angles, layout, hadamard=hadamard) for x in (keys, q))
    updated = cache_append(
        blocks, keys, block_table, positions, num_new, jnp.ones((), jnp.float32), format=format
    )
    codes, scales = quantise_queries(format, q)
    return updated, codes, weights * np.float32(weight_scale) * scales


def layer_norm(
    x: Float[Array, "*b n"], weight: Float[Array, "n"], bias: Float[Array, "n"], eps: float
) -> Float[Array, "*b n"]:
    """LayerNorm over the last axis, in float32."""
    wide = x.astype(jnp.float32)
    wide = wide - wide.mean(axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    normed = wide * jax.lax.rsqrt(variance + np.float32(eps))
    scale, bias = (a.astype(jnp.float32).reshape(*(1,) * (x.ndim - 1), -1) for a in (weight, bias))
    return (normed * scale + bias).astype(x.dtype)


def turn(
    x: Float[Array, "*b d"],
    cos: Float32[Array, "*#b pairs"] | None,
    sin: Float32[Array, "*#b pairs"] | None,
    layout: str,
    *,
    hadamard: bool,
) -> Float[Array, "*b d"]:
    """x with its first columns rotated, then multiplied with a Hadamard matrix and d^-0.5."""
    if cos is not None and sin is not None:
        turned, rest = jnp.split(x, [2 * cos.shape[-1]], axis=-1)
        x = jnp.concatenate([rotate(turned, cos, sin, layout), rest], axis=-1)
    if not hadamard:
        return x
    width = x.shape[-1]
    # Products are exact, sums float32, of which GPUs would keep fewer bits otherwise.
    spread = jnp.matmul(
        x, jnp.asarray(hadamard_matrix(width), x.dtype), precision="highest",
        preferred_element_type=jnp.float32,
    )  # fmt: skip
    return (spread * np.float32(width**-0.5)).astype(x.dtype)


def hadamard_matrix(n: int) -> np.ndarray:
    """Of 1 and -1 [n, n], for n that is a power of two."""
    matrix = np.ones((1, 1))
    while len(matrix) < n:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def quantise_queries(
    format: CacheFormat, q: Float[Array, "b s heads d"]
) -> tuple[Float8e4m3fn[Array, "b s heads d"], Float32[Array, "b s heads"]]:
    codes, scales = quantise(format, q)
    codes = jax.lax.bitcast_convert_type(codes, jnp.float8_e4m3fn)
    return codes, jax.lax.bitcast_convert_type(scales, jnp.float32)
