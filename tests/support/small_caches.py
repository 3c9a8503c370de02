"""Paged caches small enough to be followed row by row, in every layout."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jax_flashmla import BlockTable, CacheFormat, PagedCache

FORMAT = CacheFormat(d_qk=6, d_v=4, h_kv=2, block_size=4)
LAYOUTS = {
    "one layer": {},
    "one array": {"layers": 3},
    "an array per layer": {"layers": 3, "array_per_layer": True},
}


def make_cache(block_table, cache_seqlens=None, *, num_blocks=12, format=FORMAT, **layout):
    table = BlockTable.create(
        np.array(block_table, np.int32),
        None if cache_seqlens is None else np.array(cache_seqlens, np.int32),
        block_size=format.block_size,
    )
    return PagedCache.create(format, table, num_blocks=num_blocks, **layout)


def layers_of(cache):
    """The blocks of each layer, on the host, as bits [layers, num_blocks, ...]."""
    blocks = cache.blocks if isinstance(cache.blocks, tuple) else [cache.blocks]
    blocks = np.concatenate([np.asarray(x) for x in blocks]).view(np.uint16)
    return blocks.reshape(cache.layers, cache.num_blocks, *blocks.shape[1:])


def row_numbers(shape, first):
    """Rows of distinct bit patterns, [*shape, h_kv, d_qk]."""
    size = (*shape, FORMAT.h_kv, FORMAT.d_qk)
    bits = (first + np.arange(np.prod(size))) % 2**15
    return jnp.array(bits.astype(np.uint16).reshape(size).view(jnp.bfloat16))


@functools.partial(jax.jit, donate_argnums=0)
def layered_step(cache, rows, num_new):
    """A step as a model makes it: rows [layers, b, s_new, h_kv, d_qk]."""
    cache, slots = cache.advance(rows.shape[2], num_new)
    if cache.layers == 1:
        return cache.write(rows[0], slots)
    if isinstance(cache.blocks, tuple):
        for i in range(cache.layers):
            cache = cache.write(rows[i], slots, layer=i)
        return cache

    def layer(cache, layer_input):
        i, rows = layer_input
        return cache.write(rows, slots, layer=i), None

    numbers = jnp.arange(cache.layers, dtype=jnp.int32)
    return jax.lax.scan(layer, cache, (numbers, rows))[0]


@functools.partial(jax.jit, donate_argnums=0)
def whole_step(cache, rows, num_new):
    return cache.append(rows, num_new=num_new)
