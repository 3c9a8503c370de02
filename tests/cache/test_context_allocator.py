"""Blocks of sequences whose tokens ranks share."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from context_cases import count
from jax_flashmla import OutOfBlocks
from jax_flashmla.context import ContextAllocator


@settings(max_examples=30)
@given(st.integers(1, 5), st.lists(st.tuples(st.integers(0, 2), st.integers(0, 30)), max_size=12))
def test_each_rank_holds_the_blocks_of_its_tokens(size: int, steps: list) -> None:
    allocator = ContextAllocator(size, num_blocks=20, block_size=3)
    lengths: dict = {}
    for what, n in steps:
        free = [rank.num_free for rank in allocator.ranks]
        try:
            if what == 0 or not lengths:
                lengths[allocator.allocate(n)] = n
            elif what == 1:
                seq = next(iter(lengths))
                assert allocator.extend(seq, n) == tuple([] for _ in range(size))
                lengths[seq] += n
            else:
                seq, length = lengths.popitem()
                allocator.truncate(seq, min(n, length))
                lengths[seq] = min(n, length)
        except OutOfBlocks:
            assert [rank.num_free for rank in allocator.ranks] == free
        seqs = list(lengths)
        assert sorted(allocator.sequences, key=seqs.index) == seqs
        np.testing.assert_array_equal(allocator.seqlens([*seqs, None]), [*lengths.values(), 0])
        if not seqs:
            continue
        table = allocator.block_table(seqs, max_blocks=20).reshape(len(seqs), size, 20)
        for rank in range(size):
            local = count(np.array(list(lengths.values())), rank, size)
            np.testing.assert_array_equal((table[:, rank] >= 0).sum(axis=1), -(-local // 3))
            held = table[:, rank][table[:, rank] >= 0]
            assert len(set(held.tolist())) == len(held)
            assert allocator.ranks[rank].num_free == 20 - len(held)
    for seq in lengths:
        allocator.free(seq)
    assert allocator.num_free == 20


def test_forks_copy_where_a_rank_writes() -> None:
    allocator = ContextAllocator(2, num_blocks=6, block_size=4)
    prompt = allocator.allocate(5)  # tokens 0, 2, 4 on rank 0; 1, 3 on rank 1
    beam = allocator.fork(prompt)
    assert allocator.extend(prompt, 1) == ([], [(0, 1)])  # token 5 is rank 1's
    assert allocator.extend(beam, 2) == ([(0, 1)], [])
    assert allocator.block_table([prompt, beam], 1).tolist() == [[0, 1], [1, 0]]


@pytest.mark.parametrize("size", [0, -1, 2.0, True])
def test_a_bad_size_is_refused(size: object) -> None:
    with pytest.raises(ValueError, match="size must be an integer of at least 1"):
        ContextAllocator(size, 8, 4)


def test_what_is_wrong_is_named() -> None:
    allocator = ContextAllocator(2, num_blocks=2, block_size=4)
    seq = allocator.allocate(7)
    with pytest.raises(ValueError, match="must not be negative, got -1"):
        allocator.extend(seq, -1)
    with pytest.raises(ValueError, match="between 0 and sequence 0's length 7, got 8"):
        allocator.truncate(seq, 8)
    with pytest.raises(OutOfBlocks, match="2 free blocks needed on rank 0, 1 of 2 free"):
        allocator.extend(seq, 10)
    with pytest.raises(ValueError, match="unknown sequence 5"):
        allocator.extend(5, 1)
    with pytest.raises(ValueError, match="in use"):
        allocator.allocate(1, seq)
    assert allocator.sequences == (seq,)
