"""Tokens of sequences in a paged cache: room, copies, rejected tokens, shared prefixes; no JAX."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import numpy as np

from jax_flashmla.cache.allocator import BlockAllocator, OutOfBlocks, check_count
from jax_flashmla.cache.prefix import PrefixCache, chain


@dataclasses.dataclass
class _Sequence:
    tokens: list[int]  # whose rows the cache holds
    hashes: list[bytes]  # of its full blocks, each over all tokens up to its end
    salt: bytes

    def extend_hashes(self, block_size: int) -> None:
        for i in range(len(self.hashes), len(self.tokens) // block_size):
            parent = self.hashes[-1] if self.hashes else self.salt
            self.hashes.append(chain(parent, self.tokens[i * block_size : (i + 1) * block_size]))


class Scheduler:
    """Keeps the tokens of sequences over a `BlockAllocator`, with automatic prefix caching.

    A sequence's length is the number of tokens whose rows the device's cache holds: `start` counts
    what another sequence has left there, `commit` what a step has written. Room is apart: `reserve`
    makes it, and gives it up only with the sequence. Blocks full of committed tokens stay cached
    when their sequences end, until their room is needed; the least recently used are evicted first.
    A call that raises changes nothing. Not thread-safe.

    Args:
        num_blocks: blocks in the cache, with ids 0 to num_blocks - 1.
        block_size: tokens that one block holds.
        prefix_caching: whether blocks are shared between sequences with equal beginnings.

    >>> scheduler = Scheduler(num_blocks=8, block_size=4)
    >>> first = scheduler.start([1, 2, 3, 4, 5, 6])
    >>> scheduler.length(first)  # nothing is cached: the step is given all six tokens
    0
    >>> scheduler.commit(first, [1, 2, 3, 4, 5, 6])  # once that step has been dispatched
    >>> second = scheduler.start([1, 2, 3, 4, 7])
    >>> scheduler.length(second)
    4
    >>> scheduler.block_table([first, second], max_blocks=2)
    array([[0, 1],
           [0, 2]], dtype=int32)
    """

    def __init__(self, num_blocks: int, block_size: int, *, prefix_caching: bool = True):
        self.allocator = BlockAllocator(num_blocks, block_size)
        self._prefixes = PrefixCache() if prefix_caching else None
        self._sequences: dict[Hashable, _Sequence] = {}
        self._copies: list[tuple[int, int]] = []

    @property
    def num_free(self) -> int:
        """Blocks that can be handed out: no sequence holds them, though their tokens be cached."""
        return self.allocator.num_free + (self._prefixes.num_idle if self._prefixes else 0)

    @property
    def num_cached(self) -> int:
        """Blocks that a new sequence may share."""
        return len(self._prefixes) if self._prefixes is not None else 0

    @property
    def sequences(self) -> tuple[Hashable, ...]:
        """The ids of all live sequences, oldest first."""
        return tuple(self._sequences)

    def start(
        self,
        tokens: Sequence[int],
        *,
        room: int = 0,
        seq: Hashable | None = None,
        salt: bytes = b"",
    ) -> Hashable:
        """Starts a sequence with room for a prompt, sharing the blocks of its beginning.

        Its `length` is then what is shared: full blocks, and never the whole prompt, as the last
        token has to go through the model. The rest is to be computed and committed.

        Args:
            tokens: the prompt's token ids.
            room: tokens to reserve room for past the prompt.
            seq: the id to give it, anything hashable; by default an integer not in use.
            salt: only sequences of one salt share blocks (tenants, adapters).

        Returns:
            The sequence's id.

        Raises:
            OutOfBlocks: too few blocks are free.
            ValueError: no token is given, `room` is negative, or `seq` is in use.
            TypeError: tokens or `room` that are no integers, or a `salt` that is not bytes.
        """
        tokens, room = _token_ids(tokens), check_count("room", room)
        if not tokens:
            raise ValueError("tokens must have at least one token, got none")
        if not isinstance(salt, bytes):
            raise TypeError(f"salt must be bytes, got {salt!r}")
        size = self.allocator.block_size
        shareable = (len(tokens) - 1) // size * size
        new = _Sequence(tokens[:shareable], [], salt)
        shared: list[int] = []
        if self._prefixes is not None:
            new.extend_hashes(size)
            shared = self._prefixes.match(new.hashes)
        if seq is not None and seq in self._sequences:
            raise ValueError(f"seq must be a new id, got {seq!r}, which is in use")
        total = len(tokens) + room
        self._make_room(-(-total // size) - len(shared), shared)
        seq = self.allocator.allocate(total, seq, prefix=shared)
        if self._prefixes is not None:
            self._prefixes.use(shared)
        del new.tokens[len(shared) * size :], new.hashes[len(shared) :]
        self._sequences[seq] = new
        return seq

    def reserve(self, seq: Hashable, num_new_tokens: int) -> None:
        """Sees to it that there is room for `num_new_tokens` past a sequence's length.

        A block that another sequence holds too is replaced by a copy: see `take_copies`.

        Raises:
            OutOfBlocks: too few blocks are free.
            ValueError: `seq` is unknown, or `num_new_tokens` is negative.
        """
        length = self.length(seq)
        num_new_tokens = check_count("num_new_tokens", num_new_tokens)
        missing = max(length + num_new_tokens - self._reserved(seq), 0)
        self._make_room(self.allocator.blocks_needed(seq, missing))
        self._copies += self.allocator.extend(seq, missing)

    def commit(self, seq: Hashable, tokens: Iterable[int]) -> None:
        """Says that these tokens' rows follow in the cache: of a step, those that are kept.

        Raises:
            ValueError: `seq` is unknown, or has no room for them.
        """
        sequence, tokens = self._known(seq), _token_ids(tokens)
        room = self._reserved(seq) - len(sequence.tokens)
        if len(tokens) > room:
            raise ValueError(
                f"tokens must be at most {room}, the room reserved for {seq!r}, got {len(tokens)}"
            )
        sequence.tokens += tokens
        if self._prefixes is None:
            return
        known = len(sequence.hashes)
        sequence.extend_hashes(self.allocator.block_size)
        if known == len(sequence.hashes):
            return
        blocks = self.allocator.blocks(seq)
        for digest, block in zip(sequence.hashes[known:], blocks[known:], strict=False):
            if self._prefixes.add(digest, block):
                self.allocator.retain([block])

    def truncate(self, seq: Hashable, num_tokens: int) -> None:
        """Shortens a sequence to its first `num_tokens` tokens, and gives up the room past them.

        Raises:
            ValueError: `seq` is unknown, or `num_tokens` is negative or more than its length.
        """
        sequence, num_tokens = self._known(seq), check_count("num_tokens", num_tokens)
        if num_tokens > len(sequence.tokens):
            raise ValueError(
                f"num_tokens must be in [0, {len(sequence.tokens)}], the length of {seq!r}, got "
                f"{num_tokens}"
            )
        size, blocks = self.allocator.block_size, self.allocator.blocks(seq)
        self.allocator.truncate(seq, num_tokens)
        del sequence.tokens[num_tokens:], sequence.hashes[num_tokens // size :]
        if self._prefixes is None:
            return
        self._leave(blocks[-(-num_tokens // size) :])
        if num_tokens % size and blocks[num_tokens // size] in self._prefixes:
            self._evict([blocks[num_tokens // size]])  # it will be written again

    def fork(self, seq: Hashable, new_seq: Hashable | None = None) -> Hashable:
        """Starts a sequence with all of `seq`'s tokens, in the same blocks. Room is not shared.

        Returns:
            The new sequence's id: `new_seq`, by default an integer not in use.

        Raises:
            ValueError: `seq` is unknown, or `new_seq` is in use.
        """
        sequence = self._known(seq)
        new_seq = self.allocator.fork(seq, new_seq)
        self.allocator.truncate(new_seq, len(sequence.tokens))
        if self._reserved(seq) > len(sequence.tokens):
            # What seq has reserved in a partly filled block it may no longer write: the fork holds
            # it too. Its next `reserve` copies.
            self.allocator.truncate(seq, len(sequence.tokens))
        self._sequences[new_seq] = _Sequence(
            list(sequence.tokens), list(sequence.hashes), sequence.salt
        )
        return new_seq

    def free(self, seq: Hashable) -> None:
        """Ends a sequence; its full blocks stay cached while nobody needs their room.

        Raises:
            ValueError: `seq` is unknown.
        """
        self._known(seq)
        blocks = self.allocator.blocks(seq)
        self.allocator.free(seq)
        del self._sequences[seq]
        self._leave(blocks)

    def take_copies(self, size: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """`src` and `dst` for `copy_blocks`, of all calls since the last; apply before writing.

        Args:
            size: as for `BlockAllocator.plan_copies`.

        Raises:
            ValueError: `size` is too small; the copies remain to be taken.
        """
        plan = self.allocator.plan_copies(self._copies, size)
        self._copies = []
        return plan

    def length(self, seq: Hashable) -> int:
        """Tokens of a sequence whose rows the cache holds.

        Raises:
            ValueError: `seq` is unknown.
        """
        return len(self._known(seq).tokens)

    def block_table(self, seqs: Iterable[Hashable | None], max_blocks: int) -> np.ndarray:
        """As `BlockAllocator.block_table`: room included."""
        return self.allocator.block_table(seqs, max_blocks)

    def seqlens(self, seqs: Iterable[Hashable | None]) -> np.ndarray:
        """The lengths of a batch in tokens, int32 [b]; 0 where a sequence is None.

        Raises:
            ValueError: a sequence is unknown.
        """
        return np.array([0 if seq is None else self.length(seq) for seq in seqs], np.int32)

    def __repr__(self) -> str:
        return (
            f"Scheduler(num_blocks={self.allocator.num_blocks}, "
            f"block_size={self.allocator.block_size}): {self.num_free} blocks free, "
            f"{self.num_cached} cached, {len(self._sequences)} sequences"
        )

    def _known(self, seq: Hashable) -> _Sequence:
        if seq not in self._sequences:
            raise ValueError(f"seq must be a live sequence, got unknown sequence {seq!r}")
        return self._sequences[seq]

    def _reserved(self, seq: Hashable) -> int:
        return int(self.allocator.seqlens([seq])[0])

    def _make_room(self, count: int, shared: Sequence[int] = ()) -> None:
        missing = count - self.allocator.num_free
        if missing <= 0:
            return
        victims = self._prefixes.oldest(missing, shared) if self._prefixes is not None else None
        if victims is None:
            raise OutOfBlocks(
                f"{count} free blocks needed, {self.num_free} of {self.allocator.num_blocks} free"
            )
        self._evict(victims)

    def _evict(self, blocks: Sequence[int]) -> None:
        assert self._prefixes is not None
        for block in blocks:
            self._prefixes.remove(block)
        self.allocator.release(blocks)

    def _leave(self, blocks: Sequence[int]) -> None:
        if self._prefixes is not None:
            cached = [block for block in blocks if block in self._prefixes]
            self._prefixes.leave([b for b in cached if self.allocator.holders(b) == 1])


def _token_ids(tokens: Any) -> list[int]:
    """Token ids, or an array of them, as Python's integers."""
    if isinstance(tokens, str | bytes) or not isinstance(tokens, Iterable):
        raise TypeError(f"tokens must be token ids, such as [1, 2, 3], got {tokens!r}")
    try:
        return [operator.index(token) for token in tokens]
    except TypeError as error:
        raise TypeError(f"tokens must be integers: {error}") from None
