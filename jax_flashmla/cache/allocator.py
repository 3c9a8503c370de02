"""Which sequence owns which block of a paged cache: bookkeeping on the host, without JAX."""

from __future__ import annotations

import collections
import contextlib
import operator
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import numpy as np


class OutOfBlocks(RuntimeError):
    """Fewer blocks are free than a call to `BlockAllocator` needs; nothing has changed."""


class BlockAllocator:
    """Hands out the blocks of a paged cache to sequences, and takes them back.

    A sequence of `n` tokens holds `ceil(n / block_size)` blocks. `fork` makes two sequences
    share the blocks that they have in common; a block that several sequences hold is never written:
    whichever of them is extended into it first is given a copy, and `extend` says which block to
    copy where. A call that raises leaves the allocator as it was. Not thread-safe.

    Args:
        num_blocks: blocks in the cache, with ids 0 to num_blocks - 1.
        block_size: tokens that one block holds.

    >>> allocator = BlockAllocator(num_blocks=8, block_size=4)
    >>> prompt = allocator.allocate(6)
    >>> beam = allocator.fork(prompt)
    >>> allocator.extend(prompt, 1)  # writes into block 1, which beam holds too
    [(1, 2)]
    >>> allocator.extend(beam, 1)  # block 1 is beam's alone by now
    []
    >>> allocator.block_table([prompt, beam], max_blocks=3)
    array([[ 0,  2, -1],
           [ 0,  1, -1]], dtype=int32)
    >>> allocator.seqlens([prompt, beam])
    array([7, 7], dtype=int32)
    """

    def __init__(self, num_blocks: int, block_size: int):
        self.num_blocks = check_count("num_blocks", num_blocks)
        self.block_size = check_count("block_size", block_size)
        if self.num_blocks > np.iinfo(np.int32).max:
            raise ValueError(f"num_blocks must fit in int32, got {num_blocks}")
        if self.block_size == 0:
            raise ValueError("block_size must be at least 1, got 0")
        self._free = list(range(self.num_blocks - 1, -1, -1))  # a stack: lowest ids leave first
        self._holders = [0] * self.num_blocks  # how many hold each block
        self._blocks: dict[Hashable, list[int]] = {}
        self._lengths: dict[Hashable, int] = {}
        self._next_id = 0

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    @property
    def sequences(self) -> tuple[Hashable, ...]:
        """The ids of all live sequences, oldest first."""
        return tuple(self._lengths)

    def allocate(
        self, num_tokens: int = 0, seq: Hashable | None = None, *, prefix: Sequence[int] = ()
    ) -> Hashable:
        """Starts a sequence with room for its first `num_tokens` tokens.

        Args:
            num_tokens: its length in tokens; 0 starts it without a block.
            seq: the id to give it, anything hashable; by default an integer not in use.
            prefix: blocks that somebody holds, full of its first tokens, to share.

        Returns:
            The sequence's id.

        Raises:
            OutOfBlocks: too few blocks are free.
            ValueError: `num_tokens` is negative or less than `prefix` has, `seq` is in use, or
                nobody holds a block of `prefix`.
        """
        num_tokens = check_count("num_tokens", num_tokens)
        prefix = self._held("prefix", prefix)
        if len(prefix) * self.block_size > num_tokens:
            raise ValueError(
                f"num_tokens must be at least {len(prefix) * self.block_size}, the tokens of "
                f"prefix, got {num_tokens}"
            )
        seq = self._new_id(seq)
        num_new = self._blocks_for(num_tokens) - len(prefix)
        blocks = self._take(num_new, f"a sequence of {num_tokens} tokens")
        for block in prefix:
            self._holders[block] += 1
        self._add(seq, [*prefix, *blocks], num_tokens)
        return seq

    def retain(self, blocks: Iterable[int]) -> None:
        """Holds blocks beside the sequences that do, so that they outlive them: a prefix cache.

        Raises:
            ValueError: nobody holds a block.
        """
        for block in self._held("blocks", blocks):
            self._holders[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """Undoes `retain`; blocks that nobody else holds become free.

        Raises:
            ValueError: a block is given more often than it is held.
        """
        held = self._held("blocks", blocks)
        for block, times in collections.Counter(held).items():
            if times > self._holders[block]:
                raise ValueError(
                    f"blocks must have {block} at most {self._holders[block]} times, as often as "
                    f"it is held, got {times}"
                )
        self._give_up(held)

    def holders(self, block: int) -> int:
        """How many sequences, and callers of `retain`, hold a block.

        Raises:
            ValueError: the cache has no such block.
        """
        block = check_count("block", block)
        if block >= self.num_blocks:
            raise ValueError(f"block must be below num_blocks = {self.num_blocks}, got {block}")
        return self._holders[block]

    def blocks(self, seq: Hashable) -> tuple[int, ...]:
        """The blocks of a sequence, in the order of its tokens.

        Raises:
            ValueError: `seq` is unknown.
        """
        return tuple(self._known(seq))

    def blocks_needed(self, seq: Hashable, num_new_tokens: int) -> int:
        """Free blocks that `extend` would take.

        Raises:
            ValueError: `seq` is unknown, or `num_new_tokens` is negative.
        """
        blocks = self._known(seq)
        num_new_tokens = check_count("num_new_tokens", num_new_tokens)
        total = self._blocks_for(self._lengths[seq] + num_new_tokens)
        return total - len(blocks) + self._copies_last(seq, num_new_tokens)

    def extend(self, seq: Hashable, num_new_tokens: int) -> list[tuple[int, int]]:
        """Gives a sequence room for `num_new_tokens` more tokens, which it alone may write.

        Returns:
            `(src_block, dst_block)` pairs (none, or one): copy block `src_block` to `dst_block` on
            the device before anything else is written to the cache. See `plan_copies`.

        Raises:
            OutOfBlocks: too few blocks are free.
            ValueError: `seq` is unknown, or `num_new_tokens` is negative.
        """
        blocks = self._known(seq)
        num_new_tokens = check_count("num_new_tokens", num_new_tokens)
        length = self._lengths[seq]
        copies_last = self._copies_last(seq, num_new_tokens)
        needed = self.blocks_needed(seq, num_new_tokens)
        added = self._take(needed, f"{num_new_tokens} more tokens of {seq!r}")

        copies = []
        if copies_last:
            shared, own = blocks.pop(), added[0]
            self._holders[shared] -= 1  # somebody else still holds it
            copies.append((shared, own))
        blocks.extend(added)
        self._lengths[seq] = length + num_new_tokens
        return copies

    def fork(self, seq: Hashable, new_seq: Hashable | None = None) -> Hashable:
        """Starts a sequence that begins with all of `seq`'s tokens and shares its blocks.

        Needs no free block by itself: a partly filled last block is copied when one of its holders
        is extended. What is shared is what the cache holds: fork after `seq`'s tokens are written.

        Returns:
            The new sequence's id: `new_seq`, by default an integer not in use.

        Raises:
            ValueError: `seq` is unknown, or `new_seq` is in use.
        """
        blocks = self._known(seq)
        new_seq = self._new_id(new_seq)
        for block in blocks:
            self._holders[block] += 1
        self._add(new_seq, list(blocks), self._lengths[seq])
        return new_seq

    def truncate(self, seq: Hashable, num_tokens: int) -> None:
        """Shortens a sequence to its first `num_tokens` tokens and gives up the blocks past them.

        For tokens that were reserved ahead and not used, or rejected after speculation.

        Raises:
            ValueError: `seq` is unknown, or `num_tokens` is negative or more than its length.
        """
        blocks = self._known(seq)
        num_tokens = check_count("num_tokens", num_tokens)
        if num_tokens > self._lengths[seq]:
            raise ValueError(
                f"num_tokens must be at most sequence {seq!r}'s length {self._lengths[seq]}, "
                f"got {num_tokens}"
            )
        num_kept = self._blocks_for(num_tokens)
        self._give_up(blocks[num_kept:])
        del blocks[num_kept:]
        self._lengths[seq] = num_tokens

    def free(self, seq: Hashable) -> None:
        """Ends a sequence; blocks that no other sequence holds become free.

        Raises:
            ValueError: `seq` is unknown.
        """
        self._give_up(self._known(seq))
        del self._blocks[seq], self._lengths[seq]

    def block_table(self, seqs: Iterable[Hashable | None], max_blocks: int) -> np.ndarray:
        """The block ids of a batch, int32 [b, max_blocks], padded with -1.

        Args:
            seqs: the batch's b sequences; None leaves a row empty.
            max_blocks: columns of the table.

        Raises:
            ValueError: a sequence is unknown, or holds more than `max_blocks` blocks.
        """
        seqs = list(seqs)
        table = np.full((len(seqs), check_count("max_blocks", max_blocks)), -1, np.int32)
        for row, seq in enumerate(seqs):
            if seq is None:
                continue
            blocks = self._known(seq)
            if len(blocks) > max_blocks:
                raise ValueError(
                    f"max_blocks must be at least {len(blocks)}, the blocks of sequence {seq!r}, "
                    f"got {max_blocks}"
                )
            table[row, : len(blocks)] = blocks
        return table

    def seqlens(self, seqs: Iterable[Hashable | None]) -> np.ndarray:
        """The lengths of a batch in tokens, int32 [b]; 0 where a sequence is None.

        Raises:
            ValueError: a sequence is unknown.
        """
        lengths = []
        for seq in seqs:
            if seq is not None:
                self._known(seq)
            lengths.append(self._lengths.get(seq, 0))
        return np.array(lengths, np.int32)

    @staticmethod
    def plan_copies(
        pairs: Sequence[tuple[int, int]], size: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Arrays for `copy_blocks` from the pairs of one or several `extend` calls.

        `copy_blocks` copies all at once, as the cache was before; a block that is copied onwards,
        or handed out again, between the calls is resolved here, so pass the pairs in the order in
        which they came.

        Args:
            pairs: `(src_block, dst_block)`, concatenated over the calls.
            size: length of the arrays, for a shape that stays the same from step to step; filled up
                with -1, which copies nothing. By default as long as needed.

        Returns:
            `src` and `dst`, int32 [size].

        Raises:
            ValueError: `size` is too small.
        """
        source: dict[int, int] = {}  # dst: the block whose present content it ends up with
        for src, dst in pairs:
            source[dst] = source.get(src, src)
        size = len(source) if size is None else check_count("size", size)
        if size < len(source):
            raise ValueError(f"size must be at least {len(source)}, the copies to make, got {size}")
        plan = np.full((2, size), -1, np.int32)
        plan[0, : len(source)] = list(source.values())
        plan[1, : len(source)] = list(source)
        return plan[0], plan[1]

    def __repr__(self) -> str:
        return (
            f"BlockAllocator(num_blocks={self.num_blocks}, block_size={self.block_size}): "
            f"{self.num_free} blocks free, {len(self._lengths)} sequences"
        )

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def _copies_last(self, seq: Hashable, num_new_tokens: int) -> bool:
        # Tokens are written from the length on, so of the blocks held only a partly filled last one
        # is written; full ones may stay shared.
        writes_last = num_new_tokens > 0 and self._lengths[seq] % self.block_size != 0
        return writes_last and self._holders[self._blocks[seq][-1]] > 1

    def _held(self, name: str, blocks: Iterable[int]) -> list[int]:
        held = [check_count(name, block) for block in blocks]
        for block in held:
            if block >= self.num_blocks or self._holders[block] == 0:
                raise ValueError(f"{name} must be blocks that somebody holds, got {block}")
        return held

    def _known(self, seq: Hashable) -> list[int]:
        if seq not in self._blocks:
            raise ValueError(f"seq must be a live sequence, got unknown sequence {seq!r}")
        return self._blocks[seq]

    def _new_id(self, seq: Hashable | None) -> Hashable:
        if seq is None:
            while self._next_id in self._blocks:
                self._next_id += 1
            return self._next_id
        if seq in self._blocks:
            raise ValueError(f"seq must be a new id, got {seq!r}, which is in use")
        return seq

    def _add(self, seq: Hashable, blocks: list[int], length: int) -> None:
        self._blocks[seq] = blocks
        self._lengths[seq] = length
        if seq == self._next_id:
            self._next_id += 1

    def _take(self, count: int, purpose: str) -> list[int]:
        if count > len(self._free):
            raise OutOfBlocks(
                f"{purpose}: {count} free blocks needed, {self.num_free} of {self.num_blocks} free"
            )
        taken = [self._free.pop() for _ in range(count)]
        for block in taken:
            self._holders[block] = 1
        return taken

    def _give_up(self, blocks: list[int]) -> None:
        for block in reversed(blocks):
            self._holders[block] -= 1
            if self._holders[block] == 0:
                self._free.append(block)


def as_integer(name: str, value: Any) -> int:
    """The value as Python's int; TypeError for what is no integer."""
    if not isinstance(value, bool):
        with contextlib.suppress(TypeError):
            return operator.index(value)
    raise TypeError(f"{name} must be an integer, got {value!r}")


def check_count(name: str, value: int) -> int:
    count = as_integer(name, value)
    if count < 0:
        raise ValueError(f"{name} must not be negative, got {count}")
    return count
