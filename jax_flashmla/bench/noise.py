"""Normal numbers for arguments: drawn once, on the host, so that no shape compiles a generator."""

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
    """Those of different seeds are the same sequence from different places on."""
    start = seed * 1_000_003 % COUNT
    drawn = np.roll(_drawn(jnp.dtype(dtype).name, scale), -start)
    return np.resize(drawn[: math.prod(shape)], shape)


def normal(shape: tuple[int, ...], dtype: Any, device: jax.Device, seed: int = 0) -> jax.Array:
    """The same on a device."""
    return jax.device_put(host_normal(shape, dtype, seed), device)
