"""The scheduler against a model that keeps every sequence's tokens and every row of the cache."""

from __future__ import annotations

import doctest

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import jax_flashmla.cache.scheduler
from jax_flashmla import OutOfBlocks
from jax_flashmla.cache.scheduler import Scheduler

NUM_BLOCKS, SIZE = 7, 2
TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=9)


class Model(RuleBasedStateMachine):
    """A row of the cache depends on all tokens up to its own: it is that tuple."""

    caching = True

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = Scheduler(NUM_BLOCKS, SIZE, prefix_caching=self.caching)
        self.rows: dict[tuple[int, int], tuple] = {}
        self.sequences: dict[object, list[int]] = {}

    def pick(self, data: st.DataObject) -> object:
        return data.draw(st.sampled_from(list(self.sequences)))

    def blocks(self, seq: object) -> list[int]:
        return [x for x in self.scheduler.block_table([seq], NUM_BLOCKS)[0].tolist() if x >= 0]

    def apply_copies(self) -> None:
        before = dict(self.rows)
        for src, dst in zip(*map(np.ndarray.tolist, self.scheduler.take_copies()), strict=True):
            for offset in range(SIZE):
                self.rows[dst, offset] = before.get((src, offset), ())

    def write(self, seq: object, tokens: list[int], rejected: int = 0) -> None:
        """A step: the rows of all tokens are written, and those not rejected committed."""
        self.apply_copies()
        blocks, known = self.blocks(seq), self.sequences[seq]
        for token in [*tokens, *[7] * rejected]:
            position = len(known)
            known.append(token)
            self.rows[blocks[position // SIZE], position % SIZE] = tuple(known)
        del known[len(known) - rejected :]
        self.scheduler.commit(seq, tokens)

    @rule(tokens=TOKENS, room=st.integers(0, 3))
    def start(self, tokens: list[int], room: int) -> None:
        free = self.scheduler.num_free
        before = self.scheduler.num_cached
        try:
            seq = self.scheduler.start(tokens, room=room)
        except OutOfBlocks:
            # Sharing needs no more blocks than a cache without it.
            assert -(-(len(tokens) + room) // SIZE) > free
            assert (self.scheduler.num_free, self.scheduler.num_cached) == (free, before)
            return
        shared = self.scheduler.length(seq)
        assert shared % SIZE == 0
        assert shared < len(tokens)
        self.sequences[seq] = tokens[:shared]
        self.write(seq, tokens[shared:])

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), tokens=TOKENS, rejected=st.integers(0, 2))
    def step(self, data: st.DataObject, tokens: list[int], rejected: int) -> None:
        seq = self.pick(data)
        try:
            self.scheduler.reserve(seq, len(tokens) + rejected)
        except OutOfBlocks:
            return
        self.write(seq, tokens, rejected)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        seq = self.pick(data)
        self.sequences[self.scheduler.fork(seq)] = list(self.sequences[seq])

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        seq = self.pick(data)
        length = data.draw(st.integers(0, len(self.sequences[seq])))
        self.scheduler.truncate(seq, length)
        del self.sequences[seq][length:]

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        seq = self.pick(data)
        self.scheduler.free(seq)
        del self.sequences[seq]

    @invariant()
    def every_sequence_reads_its_own_rows(self) -> None:
        pending = dict(self.rows)
        for seq, tokens in self.sequences.items():
            blocks = self.blocks(seq)
            assert self.scheduler.length(seq) == len(tokens)
            assert self.scheduler.seqlens([seq, None]).tolist() == [len(tokens), 0]
            copied = {dst: src for src, dst in self.scheduler._copies}
            for i in range(len(tokens)):
                block = blocks[i // SIZE]
                row = pending[copied.get(block, block), i % SIZE]
                assert row == tuple(tokens[: i + 1])

    @invariant()
    def no_block_is_lost(self) -> None:
        held = {block for seq in self.sequences for block in self.blocks(seq)}
        assert self.scheduler.num_free + len(held) == NUM_BLOCKS
        assert self.scheduler.num_cached <= NUM_BLOCKS if self.caching else 1
        assert self.caching or self.scheduler.num_cached == 0


class WithoutCaching(Model):
    caching = False


Model.TestCase.settings = settings(max_examples=120, stateful_step_count=30)
WithoutCaching.TestCase.settings = settings(max_examples=30, stateful_step_count=30)
TestModel = Model.TestCase
TestWithoutCaching = WithoutCaching.TestCase


def run(scheduler: Scheduler, tokens: list[int], **options: object) -> tuple[object, int]:
    """A sequence with its prompt committed, and how much of it was cached."""
    seq = scheduler.start(tokens, **options)
    cached = scheduler.length(seq)
    scheduler.commit(seq, tokens[cached:])
    return seq, cached


def test_prefixes_outlive_their_sequences_until_room_is_needed():
    scheduler = Scheduler(4, 2)
    first, _ = run(scheduler, [1, 2, 3, 4])
    scheduler.free(first)
    assert (scheduler.num_free, scheduler.num_cached) == (4, 2)
    second, cached = run(scheduler, [1, 2, 3, 4, 5])
    assert cached == 4
    scheduler.free(second)
    other, cached = run(scheduler, [9, 9, 9, 9, 9, 9])  # needs a cached block: 3, 4 goes first
    assert cached == 0
    scheduler.free(other)
    assert run(scheduler, [1, 2, 3, 4])[1] == 2


def test_least_recently_used_is_evicted_first():
    scheduler = Scheduler(3, 2)
    for tokens in ([1, 1], [2, 2], [3, 3], [1, 1, 1]):
        scheduler.free(run(scheduler, tokens)[0])  # the last needs a block: that of 2, 2
    assert run(scheduler, [1, 1, 0])[1] == 2
    assert run(scheduler, [2, 2])[1] == 0


def test_a_prompt_is_never_cached_whole_and_salts_share_nothing():
    scheduler = Scheduler(8, 2)
    run(scheduler, [1, 2, 3, 4])
    assert run(scheduler, [1, 2, 3, 4])[1] == 2
    assert run(scheduler, [1, 2, 3, 4], salt=b"other")[1] == 0
    assert run(scheduler, [5, 6, 3, 4])[1] == 0  # hashes are chained


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda s: s.start([]), ValueError, "tokens must have at least one token"),
        (lambda s: s.start([1], room=-1), ValueError, "room must not be negative, got -1"),
        (lambda s: s.start("abc"), TypeError, "tokens must be token ids, .* got 'abc'"),
        (lambda s: s.start(5), TypeError, "tokens must be token ids, .* got 5"),
        (lambda s: s.start([1, 2.0]), TypeError, "tokens must be integers: 'float' object"),
        (lambda s: s.start([1], room="2"), TypeError, "room must be an integer, got '2'"),
        (lambda s: s.start([1], salt="a"), TypeError, "salt must be bytes, got 'a'"),
        (lambda s: s.reserve(0, 1.5), TypeError, "num_new_tokens must be an integer, got 1.5"),
        (lambda s: s.truncate(0, None), TypeError, "num_tokens must be an integer, got None"),
        (lambda s: s.truncate(0, -1), ValueError, "num_tokens must not be negative, got -1"),
        (lambda s: s.commit(0, "a"), TypeError, "tokens must be token ids"),
        (lambda s: s.start([1], seq=0), ValueError, "seq must be a new id, got 0"),
        (lambda s: s.start([1] * 99), OutOfBlocks, "needed, 2 of 4 free"),
        (lambda s: s.reserve(0, 99), OutOfBlocks, "needed, 2 of 4 free"),
        (lambda s: s.reserve(0, -1), ValueError, "num_new_tokens must not be negative"),
        (lambda s: s.commit(0, [1, 1]), ValueError, "at most 1, the room reserved for 0, got 2"),
        (lambda s: s.truncate(0, 4), ValueError, r"in \[0, 3\], the length of 0, got 4"),
        (lambda s: s.free(5), ValueError, "unknown sequence 5"),
        (lambda s: s.fork(5), ValueError, "unknown sequence 5"),
        (lambda s: s.length(5), ValueError, "unknown sequence 5"),
    ],
)
def test_bad_calls_are_named(call, error, message):
    scheduler = Scheduler(4, 2)
    run(scheduler, [1, 2, 3], room=1)
    with pytest.raises(error, match=message):
        call(scheduler)
    assert (scheduler.num_free, scheduler.length(0), scheduler.sequences) == (2, 3, (0,))


def test_docstring():
    result = doctest.testmod(jax_flashmla.cache.scheduler)
    assert result.attempted > 0
    assert result.failed == 0
