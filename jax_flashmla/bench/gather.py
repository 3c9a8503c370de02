"""Rows at random places: read back for a check, and how fast plain XLA gathers them."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp

from jax_flashmla.bench.measure import Method, time_calls


@jax.jit
def take(array: jax.Array, places: jax.Array) -> jax.Array:
    """array[places], as one program; outside jit it would be ten."""
    return array[places]


@jax.jit
def _sums(pool: jax.Array, index: jax.Array) -> jax.Array:
    return jnp.sum(pool[index], axis=1)


def measure_gather(device: jax.Device, method: Method, row_bytes: int) -> float:
    """GB/s of sums over rows of `row_bytes` at random places.

    Args:
        row_bytes: a multiple of 4.
    """
    on_gpu = device.platform == "gpu"
    pool_bytes, count = (1 << 32, 1 << 18) if on_gpu else (1 << 26, 1 << 13)
    num_rows = pool_bytes // row_bytes
    with jax.default_device(device):
        pool = jnp.ones((num_rows, row_bytes // 4), jnp.uint32)
        index = jax.random.randint(jax.random.key(0), (count,), 0, num_rows)
        method = replace(method, sustained_seconds=0.0)
        us = time_calls(lambda: _sums(pool, index), 1, method).us
    return count * row_bytes / us / 1e3
