"""Caches with an index pool, and a layer's attention to given tokens done naively in float64."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

import layer_cases
from jax_flashmla import BlockTable, CacheFormat, PagedCache
from jax_flashmla.layers import MLAConfig, MLAParams


def make_cache(
    config: MLAConfig,
    rooms: list[int],
    *,
    layers: int = 1,
    index_layers: int | None = None,
    dtype: str = "float32",
    name: str = "dense",
    fp8_keys: bool = False,
    pool: bool = True,
) -> PagedCache:
    """An empty cache with a pool; blocks in no order, unused slots NaN, unused entries hostile."""
    counts = [-(-room // 64) for room in rooms]
    ids = np.random.default_rng(3).permutation(sum(counts) + 1).astype(np.int32)
    table = np.full((len(rooms), max(counts) + 1), 2147480000, np.int32)
    for i, count in enumerate(counts):
        table[i, :count], ids = ids[:count], ids[count:]
    index_format = CacheFormat(name="fp8_index") if fp8_keys else config.index_format(dtype)
    row_dtype = "bfloat16" if name == "v32" else dtype
    cache = PagedCache.create(
        config.cache_format(row_dtype, 64, name=name),
        BlockTable.create(table),
        num_blocks=sum(counts) + 1,
        layers=layers,
        index_format=index_format if pool else None,
        index_layers=index_layers if pool else None,
    )
    poison = lambda x: jnp.full_like(x, 0x7F if x.dtype == jnp.uint8 else jnp.nan)  # noqa: E731
    return dataclasses.replace(
        cache,
        blocks=jax.tree.map(poison, cache.blocks),
        index_blocks=jax.tree.map(poison, cache.index_blocks),
    )


def positions_of_slots(cache: PagedCache, slots: jax.Array) -> np.ndarray:
    """Token positions of slots [b, s, topk], of the unshifted table; -1 stays."""
    table, slots = np.asarray(cache.table.block_table), np.asarray(slots)
    positions = np.full(slots.shape, -1)
    for i, row in enumerate(table):
        for block, id in enumerate(row):
            here = (slots[i] >= 0) & (slots[i] // 64 == id)
            positions[i][here] = block * 64 + slots[i][here] % 64
    assert ((positions >= 0) == (slots >= 0)).all()
    return positions


def naive_layer(
    config: MLAConfig, params: MLAParams, x: np.ndarray, selected: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """As `layer_cases.naive_layer`, each token attending to selected [tokens, any] of those up to
    itself."""
    seen = np.zeros((len(x), len(x)), bool)
    for i, row in enumerate(selected):
        seen[i, row[(row >= 0) & (row <= i)]] = True
    return layer_cases.naive_layer(config, params, x, seen)
