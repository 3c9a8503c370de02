"""Random blocks of any cache format, which all shapes of a run share."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jax_flashmla import CacheFormat
from jax_flashmla.cache.quantise import quantise

SLAB_NUMBERS = 1 << 27  # of more, all are repeated


class Pool:
    """Blocks of one format at a time: shapes of one format are measured one after the other."""

    def __init__(self, num_blocks: dict[CacheFormat, int], device: jax.Device) -> None:
        """num_blocks: of each format, for the shape that needs most."""
        self._num_blocks = num_blocks
        self._device = device
        self._made: tuple[CacheFormat, jax.Array] | None = None

    def blocks(self, format: CacheFormat) -> jax.Array:
        """[num_blocks, *format.block_shape]; those of another format are freed."""
        if self._made is None or self._made[0] != format:
            self._made = None
            self._made = format, random_blocks(format, self._num_blocks[format], self._device)
        return self._made[1]


def random_blocks(format: CacheFormat, num_blocks: int, device: jax.Device) -> jax.Array:
    """Rows of normal numbers; a slab of them is stored again and again."""
    slab = min(num_blocks, max(1, SLAB_NUMBERS // (format.block_size * format.d_qk)))
    with jax.default_device(device):
        stored = _slab(format, slab)
        pool = format.allocate(num_blocks)
        for start in range(0, num_blocks, slab):
            pool = _place(pool, stored, np.int32(min(start, num_blocks - slab)))
    return pool


@partial(jax.jit, donate_argnums=0)
def _place(pool: jax.Array, stored: jax.Array, start: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice(pool, stored, (start, *(0,) * (pool.ndim - 1)))


@partial(jax.jit, static_argnums=(0, 1))
def _slab(format: CacheFormat, num_blocks: int) -> jax.Array:
    """Blocks of random rows."""
    ends = (num_blocks, format.block_size, format.d_qk)
    rows = jax.random.normal(jax.random.key(1), ends, format.dtype)
    if format.name == "dense":
        return rows[:, :, None]
    planes = quantise(format, rows)
    if len(planes) == 1:
        return planes[0][:, :, None]
    stored = jnp.concatenate([plane.reshape(len(rows), -1) for plane in planes], axis=1)
    return jnp.pad(stored, ((0, 0), (0, format.block_bytes - stored.shape[1])))
