"""Rotary embeddings: frequencies on the host, rotation on the device, both in float32."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from jax_flashmla.layers.config import MLAConfig
from jax_flashmla.layers.rope_config import YarnConfig


def inverse_frequencies(config: MLAConfig) -> np.ndarray:
    """Radians per token of each pair of columns, float32 [qk_rope_head_dim / 2].

    The powers are rounded to float32 before anything else is done with them, as in the original
    implementations: at position 100,000 the last bit of a frequency is worth 0.006 radians.
    """
    dim, rope = config.qk_rope_head_dim, config.rope
    wavelengths = (float(rope.theta) ** (np.arange(0, dim, 2) / dim)).astype(np.float32)
    one = np.float32(1)
    if rope.longrope is not None:
        with np.errstate(over="ignore"):  # beyond float32, a pair does not turn
            return one / (np.array(rope.longrope.factors, np.float32) * wavelengths)
    if rope.yarn is None:
        return one / wavelengths
    kept = one - _yarn_ramp(rope.yarn, dim, float(rope.theta))
    with np.errstate(over="ignore"):  # beyond float32, a pair does not turn
        interpolated = one / (np.float32(rope.yarn.factor) * wavelengths)
    return interpolated * (one - kept) + one / wavelengths * kept


def _yarn_ramp(yarn: YarnConfig, dim: int, theta: float) -> np.ndarray:
    """How far each pair is interpolated, 0 to 1, float32 [dim / 2]."""

    def pair_of(rotations: float) -> float:  # that makes as many within the original context
        wavelength = yarn.original_max_positions / (rotations * 2 * math.pi)
        return dim * math.log(wavelength) / (2 * math.log(theta))

    low, high = pair_of(yarn.beta_fast), pair_of(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # a step
    pairs = np.arange(dim // 2, dtype=np.float32)
    return np.clip((pairs - np.float32(low)) / np.float32(high - low), 0, 1)


def cos_and_sin(config: MLAConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of every pair's angle at positions [b, s], scaled: float32 [b, s, qk_rope_head_dim / 2]."""
    angles = positions.astype(jnp.float32)[:, :, None] * inverse_frequencies(config)[None, None, :]
    scale = np.float32(config.rope.rotation_scale)
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def rotate(
    config: MLAConfig, x: jax.Array, positions: jax.Array, layout: str | None = None
) -> jax.Array:
    """Applies the rotary embedding.

    Args:
        config: the layer.
        x: [b, s, heads, qk_rope_head_dim], floating.
        positions: [b, s] int32.
        layout: other than the config's, as an indexer may have it.

    Returns:
        The rotated columns in x's dtype, computed in float32.
    """
    if config.rope.layout == "none":
        return x
    layout = config.rope.layout if layout is None else layout
    cos, sin = (a[:, :, None, :] for a in cos_and_sin(config, positions))
    wide = x.astype(jnp.float32)
    if layout == "half":
        first, second = jnp.split(wide, 2, axis=-1)
    else:
        first, second = wide[..., 0::2], wide[..., 1::2]
    pair = first * cos - second * sin, second * cos + first * sin
    if layout == "interleaved":
        rotated = jnp.stack(pair, axis=-1).reshape(x.shape)
    else:
        rotated = jnp.concatenate(pair, axis=-1)
    return rotated.astype(x.dtype)
