"""Caches whose batch changes: forks, new tables, what tables bound, and what `check` finds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_flashmla import (
    BlockAllocator,
    BlockTable,
    CacheFormat,
    PagedCache,
)
from small_caches import (
    FORMAT,
    LAYOUTS,
    layered_step,
    layers_of,
    make_cache,
    row_numbers,
    whole_step,
)

pytestmark = pytest.mark.usefixtures("on_cpu")


@pytest.fixture(params=LAYOUTS.values(), ids=LAYOUTS)
def layout(request):
    return request.param


def test_forked_sequences_decode_as_if_they_were_apart(layout):
    allocator = BlockAllocator(12, 4)
    step = functools.partial(layered_step, num_new=None)
    prompt = allocator.allocate(6)
    cache = make_cache(allocator.block_table([prompt], 4), **layout)
    layers = cache.layers
    prefill = row_numbers((layers, 1, 6), 0)
    cache = step(cache, prefill)
    tokens = {prompt: np.asarray(prefill[:, 0]).view(np.uint16)}

    for _ in range(2):
        fork = allocator.fork(prompt)
        tokens[fork] = tokens[prompt]
    for number in range(1, 6):
        seqs = list(tokens)
        lengths = allocator.seqlens(seqs)
        pairs = [pair for seq in seqs for pair in allocator.extend(seq, 1)]
        assert len(pairs) == (2 if number == 1 else 0)
        cache = cache.copy_blocks(*BlockAllocator.plan_copies(pairs, size=3))
        cache = cache.with_table(allocator.block_table(seqs, 4), lengths)
        rows = row_numbers((layers, 3, 1), 1000 * number)
        cache = step(cache, rows)
        assert cache.check() == []
        for i, seq in enumerate(seqs):
            new = np.asarray(rows[:, i]).view(np.uint16)
            tokens[seq] = np.concatenate([tokens[seq], new], axis=1)
    blocks = layers_of(cache)
    for i, seq in enumerate(tokens):
        ids = np.asarray(cache.table.block_table[i, :3])
        held = blocks[:, ids].reshape(layers, 12, FORMAT.h_kv, FORMAT.d_qk)
        np.testing.assert_array_equal(held[:, : tokens[seq].shape[1]], tokens[seq])


def test_more_blocks_keep_the_lengths_and_a_new_batch_does_not():
    cache = make_cache([[0], [1]]).append(row_numbers((2, 5), 0))
    assert cache.overflow.tolist() == [1, 1]
    extended = cache.with_table(np.array([[0, 2], [1, 3]], np.int32))
    assert extended.table.cache_seqlens.tolist() == [4, 4]
    assert extended.overflow.tolist() == [1, 1]
    other = cache.with_table(np.array([[0]], np.int32), np.array([3], np.int32))
    assert other.table.cache_seqlens.tolist() == [3]
    assert other.overflow.tolist() == [0]


def test_donating_a_cache_leaves_what_it_was_made_of():
    block_table, lengths = jnp.array([[0, 1]], jnp.int32), jnp.array([3], jnp.int32)
    cache = make_cache([[5]]).with_table(block_table, lengths)
    whole_step(cache, row_numbers((1, 1, 1), 0), None)
    assert cache.table.cache_seqlens.is_deleted()
    assert block_table.tolist() == [[0, 1]]
    assert lengths.tolist() == [3]


def test_a_tables_width_bounds_its_sequences():
    table = BlockTable.create(np.full((5, 3), -1, np.int32), block_size=16)
    assert (table.max_blocks, table.max_seqlen) == (3, 48)


def test_one_table_serves_many_caches():
    table = BlockTable.create(np.array([[0, 1]], np.int32), block_size=64)
    for _ in range(2):
        cache = PagedCache.create(CacheFormat(d_qk=8, d_v=8), table, num_blocks=2)
        jax.jit(lambda c: c, donate_argnums=0)(cache)
        assert cache.table.block_table.is_deleted()
        assert table.block_table.tolist() == [[0, 1]]


@pytest.mark.parametrize(
    ("block_table", "cache_seqlens", "found"),
    [
        ([[0, 1], [2, -1]], [8, 4], []),
        ([[0, 1], [0, 2]], [5, 6], []),  # a full block may be shared
        ([[0, 2147480000], [2, -1]], [4, 0], []),  # what no length covers is not read
        (
            [[0, 1], [2, 3]],
            [9, -1],
            ["sequence 0 has 9 tokens, its table holds 0 to 8", "sequence 1 has -1 tokens"],
        ),
        (
            [[0, -1], [12, 2]],
            [5, 1],
            [
                "sequence 0 reads block -1 at entry 1, the cache has blocks 0 to 11",
                "sequence 1 reads block 12 at entry 0",
            ],
        ),
        (
            [[0, 1], [0, 1]],
            [5, 6],
            [
                "sequence 0 writes block 1 at entry 1, which sequences [1] hold",
                "sequence 1 writes block 1 at entry 1, which sequences [0] hold",
            ],
        ),
        ([[0, 1], [1, 2]], [7, 8], ["sequence 0 writes block 1 at entry 1, which sequences [1]"]),
        ([[3, 3], [1, 2]], [4, 8], ["sequence 0 writes block 3 at entry 1, which it holds twice"]),
    ],
)
def test_check_lists_bad_values(layout, block_table, cache_seqlens, found):
    listed = make_cache(block_table, cache_seqlens, **layout).check()
    assert len(listed) == len(found)
    for line, start in zip(listed, found, strict=True):
        assert line.startswith(start)


# What the documentation shows.
