"""Paged caches small enough to be followed row by row, in every layout."""

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
