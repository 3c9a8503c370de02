"""Random arguments, made on the host, so that no shape compiles a generator."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

COUNT = 1 << 22  # larger arrays repeat them


@functools.cache
def _drawn(dtype: str, scale: float) -> np.ndarray:
    numbers = np.random.default_rng(3).standard_normal(COUNT, np.float32)
    return (numbers * np.float32(scale)).astype(jnp.dtype(dtype))


def host_normal(
    shape: tuple[int, ...], dtype: Any, seed: int = 0, scale: float = 1.0
) -> np.ndarray:
    """Normal numbers; of different seeds the same sequence from different places on."""
    start, size = seed * 1_000_003 % COUNT, math.prod(shape)
    drawn = _drawn(jnp.dtype(dtype).name, scale)
    if start + size <= COUNT:
        return drawn[start : start + size].reshape(shape)
    return np.resize(np.roll(drawn, -start)[:size], shape)


def normal(shape: tuple[int, ...], dtype: Any, device: jax.Device, seed: int = 0) -> jax.Array:
    """The same on a device."""
    return jax.device_put(host_normal(shape, dtype, seed), device)


def runs(numbers: np.ndarray, start: np.ndarray, length: int) -> np.ndarray:
    """int32 [len(start), length]: so many of `numbers` from each start on, going round."""
    around = np.concatenate([numbers, numbers[:length]]).astype(np.int32)
    return np.lib.stride_tricks.sliding_window_view(around, length)[start]
