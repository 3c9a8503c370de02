"""BlockAllocator: against a naive model that keeps every sequence's tokens apart."""

import copy
import doctest
import pickle
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
)

import jax_flashmla.cache.allocator
from jax_flashmla.cache.allocator import BlockAllocator, OutOfBlocks


class AllocatorMachine(RuleBasedStateMachine):
    """Drives an allocator and a cache of one number per token, as a user drives the device's.

    Copies and writes wait until `flush`, as they do while a step is prepared.
    """

    seqs = Bundle("seqs")

    @initialize(num_blocks=st.integers(0, 12), block_size=st.integers(1, 5))
    def start(self, num_blocks, block_size):
        self.allocator = BlockAllocator(num_blocks, block_size)
        self.cache = np.full((num_blocks, block_size), -1)
        self.tokens: dict = {}  # the model: each sequence's tokens
        self.written: dict = {}  # how many of them are in the cache
        self.copies: list = []
        self.last_token = 0

    def blocks_of(self, seq):
        row = self.allocator.block_table([seq], self.allocator.num_blocks)[0]
        return row[row >= 0].tolist()

    def holders(self, block):
        return sum(block in self.blocks_of(seq) for seq in self.tokens)

    def new_tokens(self, count):
        self.last_token += count
        return list(range(self.last_token - count, self.last_token))

    def attempt(self, num_needed, call):
        """Calls, expecting success exactly where `num_needed` blocks are free."""
        before = copy.deepcopy(vars(self.allocator))
        if num_needed <= before["num_blocks"] - self.num_held():
            return call()
        with pytest.raises(OutOfBlocks, match=f"{num_needed} free blocks needed"):
            call()
        assert vars(self.allocator) == before
        return None

    def num_held(self):
        return len({block for seq in self.tokens for block in self.blocks_of(seq)})

    @rule(target=seqs, count=st.integers(0, 20))
    def allocate(self, count):
        num_needed = -(-count // self.allocator.block_size)
        seq = self.attempt(num_needed, lambda: self.allocator.allocate(count))
        if seq is None:
            return multiple()
        assert seq not in self.tokens
        self.tokens[seq] = self.new_tokens(count)
        self.written[seq] = 0
        return seq

    @rule(seq=seqs, count=st.integers(0, 12))
    def extend(self, seq, count):
        size = self.allocator.block_size
        length = len(self.tokens[seq])
        blocks = self.blocks_of(seq)
        num_needed = -(-(length + count) // size) - len(blocks)
        if count and length % size:
            num_needed += self.holders(blocks[-1]) > 1
        copies = self.attempt(num_needed, lambda: self.allocator.extend(seq, count))
        if copies is None:
            return
        self.copies += copies
        self.tokens[seq] += self.new_tokens(count)
        if count:  # whatever it writes to is its own
            for block in self.blocks_of(seq)[length // size :]:
                assert self.holders(block) == 1

    @rule(target=seqs, seq=seqs)
    def fork(self, seq):
        self.flush()  # what is shared must be in the cache
        new = self.allocator.fork(seq)
        assert new not in self.tokens
        self.tokens[new] = list(self.tokens[seq])
        self.written[new] = self.written[seq]
        return new

    @rule(seq=seqs, fraction=st.floats(0, 1))
    def truncate(self, seq, fraction):
        length = int(fraction * len(self.tokens[seq]))
        self.allocator.truncate(seq, length)
        del self.tokens[seq][length:]
        self.written[seq] = min(self.written[seq], length)

    @rule(seq=consumes(seqs))
    def free(self, seq):
        self.allocator.free(seq)
        del self.tokens[seq], self.written[seq]
        with pytest.raises(ValueError, match="unknown sequence"):
            self.allocator.extend(seq, 1)

    @rule()
    def flush(self):
        src, dst = BlockAllocator.plan_copies(self.copies)
        self.cache[dst] = self.cache[src]
        self.copies = []
        for seq, tokens in self.tokens.items():
            blocks = self.blocks_of(seq)
            for position in range(self.written[seq], len(tokens)):
                block, slot = divmod(position, self.allocator.block_size)
                self.cache[blocks[block], slot] = tokens[position]
            self.written[seq] = len(tokens)
        for seq, tokens in self.tokens.items():
            assert self.cache[self.blocks_of(seq)].ravel()[: len(tokens)].tolist() == tokens

    @invariant()
    def counts_agree(self):
        if not hasattr(self, "allocator"):
            return
        size = self.allocator.block_size
        assert self.allocator.num_free == self.allocator.num_blocks - self.num_held()
        assert self.allocator.sequences == tuple(self.tokens)
        lengths = [len(tokens) for tokens in self.tokens.values()]
        assert self.allocator.seqlens(self.tokens).tolist() == lengths
        for seq, length in zip(self.tokens, lengths, strict=True):
            assert len(self.blocks_of(seq)) == -(-length // size)

    def teardown(self):
        if not hasattr(self, "allocator"):
            return
        self.flush()
        for seq in list(self.tokens):
            self.allocator.free(seq)
        assert self.allocator.num_free == self.allocator.num_blocks


TestAllocatorMachine = AllocatorMachine.TestCase
TestAllocatorMachine.settings = settings(max_examples=150, stateful_step_count=40)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=12))
def test_planned_copies_at_once_equal_the_pairs_one_by_one(pairs):
    one_by_one = np.arange(6)
    for src, dst in pairs:
        one_by_one[dst] = one_by_one[src]
    src, dst = BlockAllocator.plan_copies(pairs, size=12)
    src, dst = src[dst >= 0], dst[dst >= 0]
    assert len(set(dst.tolist())) == len(dst)
    at_once = np.arange(6)
    at_once[dst] = np.arange(6)[src]
    assert at_once.tolist() == one_by_one.tolist()


def test_plan_is_padded_and_must_fit():
    src, dst = BlockAllocator.plan_copies([(4, 2)], size=3)
    assert src.dtype == dst.dtype == np.int32
    assert src.tolist() == [4, -1, -1]
    assert dst.tolist() == [2, -1, -1]
    assert BlockAllocator.plan_copies([])[0].shape == (0,)
    with pytest.raises(ValueError, match=r"size must be at least 2.*got 1"):
        BlockAllocator.plan_copies([(0, 1), (0, 2)], size=1)


@pytest.mark.parametrize("first", [0, 1, 2])
def test_whoever_extends_a_shared_block_first_gets_the_copy(first):
    allocator = BlockAllocator(8, 4)
    seqs = [allocator.allocate(6)]
    seqs += [allocator.fork(seqs[0]), allocator.fork(seqs[0])]
    assert allocator.num_free == 6  # a fork holds no block of its own
    order = [seqs[first], *(seq for seq in seqs if seq != seqs[first])]
    assert allocator.extend(order[0], 1) == [(1, 2)]
    assert allocator.extend(order[1], 1) == [(1, 3)]
    assert allocator.extend(order[2], 1) == []  # the last holder writes in place
    table = allocator.block_table(order, 2)
    assert table.tolist() == [[0, 2], [0, 3], [0, 1]]


def test_full_blocks_stay_shared_until_truncated_into():
    allocator = BlockAllocator(8, 4)
    seq = allocator.allocate(8)
    fork = allocator.fork(seq)
    assert allocator.extend(seq, 1) == []
    allocator.truncate(fork, 6)
    assert allocator.extend(fork, 1) == [(1, 3)]
    assert allocator.block_table([seq, fork], 3).tolist() == [[0, 1, 2], [0, 3, -1]]


def test_extending_by_nothing_copies_nothing():
    allocator = BlockAllocator(1, 4)
    seq = allocator.allocate(2)
    allocator.fork(seq)
    assert allocator.extend(seq, 0) == []
    with pytest.raises(OutOfBlocks):  # the copy itself needs a block
        allocator.extend(seq, 1)


def test_own_ids_and_empty_rows():
    allocator = BlockAllocator(4, 2)
    assert allocator.allocate(3, seq="request-7") == "request-7"
    assert allocator.allocate(1, seq=0) == 0
    assert allocator.allocate(0) == 1
    assert allocator.fork("request-7", "request-8") == "request-8"
    table = allocator.block_table([None, "request-8"], 3)
    assert table.dtype == np.int32
    assert table.tolist() == [[-1, -1, -1], [0, 1, -1]]
    assert allocator.seqlens([None, "request-8"]).tolist() == [0, 3]
    assert repr(allocator).endswith("1 blocks free, 4 sequences")


def test_a_pickled_allocator_goes_on_alike():
    allocator = BlockAllocator(8, 4)
    seq = allocator.allocate(6)
    fork = allocator.fork(seq)
    other = pickle.loads(pickle.dumps(allocator))
    assert other.extend(fork, 9) == allocator.extend(fork, 9)
    assert np.array_equal(other.block_table([seq, fork], 8), allocator.block_table([seq, fork], 8))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda a: a.allocate(-1), ValueError, "num_tokens must not be negative, got -1"),
        (lambda a: a.allocate(1.5), TypeError, "num_tokens must be an integer, got 1.5"),
        (lambda a: a.allocate(True), TypeError, "num_tokens must be an integer, got True"),
        (lambda a: a.allocate(1, seq=0), ValueError, "seq must be a new id, got 0"),
        (lambda a: a.allocate(100), OutOfBlocks, "25 free blocks needed, 6 of 8 free"),
        (lambda a: a.extend(0, -1), ValueError, "num_new_tokens must not be negative, got -1"),
        (lambda a: a.extend(0, 100), OutOfBlocks, "25 free blocks needed, 6 of 8 free"),
        (lambda a: a.extend(9, 1), ValueError, "unknown sequence 9"),
        (lambda a: a.fork("x"), ValueError, "unknown sequence 'x'"),
        (lambda a: a.fork(0, 0), ValueError, "seq must be a new id, got 0"),
        (lambda a: a.free(9), ValueError, "unknown sequence 9"),
        (lambda a: a.truncate(0, 7), ValueError, "at most sequence 0's length 6, got 7"),
        (lambda a: a.truncate(0, -1), ValueError, "num_tokens must not be negative, got -1"),
        (lambda a: a.truncate(9, 0), ValueError, "unknown sequence 9"),
        (lambda a: a.block_table([0], 1), ValueError, "max_blocks must be at least 2.*got 1"),
        (lambda a: a.block_table([9], 1), ValueError, "unknown sequence 9"),
        (lambda a: a.seqlens([9]), ValueError, "unknown sequence 9"),
        (lambda a: a.release([0, 0]), ValueError, "blocks must have 0 at most 1 times, .* got 2"),
        (lambda a: a.release([1, 7]), ValueError, "blocks must be blocks that somebody holds"),
        (lambda a: a.holders(-1), ValueError, "block must not be negative, got -1"),
        (lambda a: a.holders(8), ValueError, "block must be below num_blocks = 8, got 8"),
    ],
)
def test_a_call_that_raises_changes_nothing(call, error, message):
    allocator = BlockAllocator(8, 4)
    allocator.allocate(6)
    before = copy.deepcopy(vars(allocator))
    with pytest.raises(error, match=message):
        call(allocator)
    assert vars(allocator) == before


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((-1, 64), ValueError, "num_blocks must not be negative, got -1"),
        ((2**31, 64), ValueError, "num_blocks must fit in int32, got 2147483648"),
        ((8, 0), ValueError, "block_size must be at least 1, got 0"),
        ((8, "64"), TypeError, "block_size must be an integer, got '64'"),
    ],
)
def test_bad_pools_are_refused(args, error, message):
    with pytest.raises(error, match=message):
        BlockAllocator(*args)


def test_docstrings():
    result = doctest.testmod(jax_flashmla.cache.allocator)
    assert result.attempted > 0
    assert result.failed == 0


def test_the_allocator_does_not_import_jax():
    path = jax_flashmla.cache.allocator.__file__
    code = f"import runpy, sys; runpy.run_path({path!r}); assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
