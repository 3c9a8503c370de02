"""A second pool, of an indexer's keys, over the cache's one table."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_flashmla import BlockTable, CacheFormat, PagedCache, cache_append
from jax_flashmla.reference.rows import load_rows

pytestmark = pytest.mark.usefixtures("on_cpu")

FORMAT = CacheFormat(d_qk=24, d_v=16, block_size=64)
INDEX = CacheFormat(name="fp8_index")


def make_cache(**options: object) -> PagedCache:
    table = BlockTable.create([[0, 2], [3, -1]], block_size=64)
    return PagedCache.create(FORMAT, table, num_blocks=5, layers=3, **options)


def keys_of(cache: PagedCache, layer: int, sequence: int, n: int) -> np.ndarray:
    """A sequence's first n keys [n, 128]."""
    view = cache.index_layer(layer)
    rows = np.asarray(load_rows(INDEX, view.blocks, jnp.float32(1)), np.float32)
    rows = rows.reshape(-1, 64, 128)
    return np.concatenate([rows[i] for i in np.asarray(view.block_table)[sequence]])[:n]


@pytest.mark.parametrize("array_per_layer", [False, True])
def test_keys_are_written_where_rows_are(array_per_layer: bool) -> None:
    cache = make_cache(index_format=INDEX, index_layers=2, array_per_layer=array_per_layer)
    rng = np.random.default_rng(0)
    keys = rng.integers(-4, 5, (2, 2, 70, 1, 128)).astype(jnp.bfloat16)  # exact in e4m3

    @jax.jit
    def step(cache: PagedCache, keys: jax.Array) -> PagedCache:
        cache, slots = cache.advance(70, jnp.array([70, 9], jnp.int32))
        for layer in range(2):
            cache = cache.write_index(keys[layer], slots, layer=layer)
        return cache

    cache = step(cache, keys)
    np.testing.assert_array_equal(cache.table.cache_seqlens, [70, 9])
    for layer in range(2):
        for sequence, n in enumerate((70, 9)):
            expected = keys[layer, sequence, :n, 0].astype(np.float32)
            np.testing.assert_array_equal(keys_of(cache, layer, sequence, n), expected)
    copied = cache.copy_blocks([3], [4]).with_table([[4, -1], [-1, -1]])
    for layer in range(2):
        expected = keys[layer, 1, :9, 0].astype(np.float32)
        np.testing.assert_array_equal(keys_of(copied, layer, 0, 9), expected)


def test_views_carry_format_and_place() -> None:
    cache = make_cache(index_format=INDEX)
    assert len(jax.tree.leaves(cache)) == 5
    assert len(jax.tree.leaves(make_cache())) == 4
    view, index = cache.layer(2), cache.index_layer(jnp.int32(1))
    assert (view.first_block, view.num_blocks, view.format) == (10, 5, FORMAT)
    assert (index.first_block, index.num_blocks, index.format) == (5, 5, INDEX)
    blocks, block_table, cache_seqlens = view
    assert (len(view), view[1]) == (3, block_table)
    np.testing.assert_array_equal(block_table, [[10, 12], [13, -1]])
    assert index.blocks.shape == (15, 64 * 132)
    specs = cache.specs(batch="data")
    assert jax.tree.structure(specs) == jax.tree.structure(cache)


def test_wrong_calls_are_named() -> None:
    cache = make_cache()
    _, slots = cache.advance()
    with pytest.raises(ValueError, match="the cache must have an index pool, got one made without"):
        cache.write_index(jnp.zeros((2, 1, 1, 128), jnp.bfloat16), slots, layer=0)
    with pytest.raises(ValueError, match="the cache must have an index pool"):
        cache.index_layer(0)
    with pytest.raises(ValueError, match="index_layers must be None without index_format, got 2"):
        make_cache(index_layers=2)
    with pytest.raises(TypeError, match="index_format must be a CacheFormat, got 'fp8_index'"):
        make_cache(index_format="fp8_index")
    with pytest.raises(ValueError, match="layer must be between 0 and 0, got 1"):
        make_cache(index_format=INDEX, index_layers=1).index_layer(1)
    with pytest.raises(ValueError, match=r"rows must end in blocks' \[h_kv, d_qk\] = \[1, 128\]"):
        cache_append(
            INDEX.allocate(2),
            jnp.zeros((1, 1, 1, 64), jnp.bfloat16),
            np.zeros((1, 1), np.int32),
            np.zeros(1, np.int32),
            format=INDEX,
        )
