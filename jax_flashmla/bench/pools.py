"""Random blocks of any cache format, which all shapes of a run share."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

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

    def abstract(self, format: CacheFormat) -> jax.ShapeDtypeStruct:
        """What `blocks` returns, without it."""
        return jax.eval_shape(partial(random_blocks, format, self._num_blocks[format]))

    def blocks(self, format: CacheFormat) -> jax.Array:
        """[num_blocks, *format.block_shape]; those of another format are freed."""
        if self._made is None or self._made[0] != format:
            self._made = None
            with jax.default_device(self._device):
                self._made = format, random_blocks(format, self._num_blocks[format])
        return self._made[1]


@partial(jax.jit, static_argnums=(0, 1))
def random_blocks(format: CacheFormat, num_blocks: int) -> jax.Array:
    """Rows of normal numbers; a slab of them is stored again and again."""
    slab = min(num_blocks, max(1, SLAB_NUMBERS // (format.block_size * format.d_qk)))
    stored = _slab(format, slab)
    first = (0,) * (stored.ndim - 1)

    def store(i: jax.Array, pool: jax.Array) -> jax.Array:
        start = jnp.minimum(i * slab, num_blocks - slab)
        return jax.lax.dynamic_update_slice(pool, stored, (start, *first))

    return jax.lax.fori_loop(0, -(-num_blocks // slab), store, format.allocate(num_blocks))


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
