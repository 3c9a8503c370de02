"""Blocks of sequences whose tokens are shared out over ranks: on the host, without JAX."""

from __future__ import annotations

from collections.abc import Hashable, Iterable

import numpy as np

from jax_flashmla.cache.allocator import BlockAllocator, OutOfBlocks


class ContextAllocator:
    """Hands out the blocks of a paged cache whose tokens ranks share, as `jax_flashmla.context`.

    Token t of a sequence is on rank t mod size, so a sequence of n tokens holds
    `ceil(ceil((n - rank) / size) / block_size)` blocks on each. A call that raises leaves all ranks
    as they were. Not thread-safe.

    Args:
        size: how many ranks there are.
        num_blocks: blocks of each rank, with ids 0 to num_blocks - 1.
        block_size: tokens that one block holds.

    Attributes:
        ranks: each rank's BlockAllocator.

    >>> allocator = ContextAllocator(size=2, num_blocks=8, block_size=4)
    >>> prompt = allocator.allocate(9)  # five tokens are on rank 0, four on rank 1
    >>> allocator.block_table([prompt], max_blocks=3)  # rank 0's columns, then rank 1's
    array([[ 0,  1, -1,  0, -1, -1]], dtype=int32)
    >>> allocator.extend(prompt, 1)  # no block to copy on either
    ([], [])
    >>> allocator.block_table([prompt], max_blocks=3)
    array([[ 0,  1, -1,  0,  1, -1]], dtype=int32)
    >>> allocator.seqlens([prompt])
    array([10], dtype=int32)
    """

    def __init__(self, size: int, num_blocks: int, block_size: int):
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"size must be an integer of at least 1, got {size!r}")
        self.ranks = tuple(BlockAllocator(num_blocks, block_size) for _ in range(size))

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds, on the rank that has fewest."""
        return min(rank.num_free for rank in self.ranks)

    @property
    def sequences(self) -> tuple[Hashable, ...]:
        """The ids of all live sequences, oldest first."""
        return self.ranks[0].sequences

    def allocate(self, num_tokens: int = 0, seq: Hashable | None = None) -> Hashable:
        """Starts a sequence with room for its first `num_tokens` tokens; see `BlockAllocator`.

        Raises:
            OutOfBlocks: too few blocks are free on some rank.
            ValueError: `num_tokens` is negative, or `seq` is in use.
        """
        seq = self.ranks[0].allocate(0, seq)
        try:
            for rank in self.ranks[1:]:
                rank.allocate(0, seq)
            self.extend(seq, num_tokens)
        except BaseException:
            self.free(seq)
            raise
        return seq

    def extend(self, seq: Hashable, num_new_tokens: int) -> tuple[list[tuple[int, int]], ...]:
        """Gives a sequence room for `num_new_tokens` more tokens, which it alone may write.

        Returns:
            For each rank, the blocks to copy there first; see `BlockAllocator.extend`.

        Raises:
            OutOfBlocks: too few blocks are free on some rank.
            ValueError: `seq` is unknown, or `num_new_tokens` is negative.
        """
        before = self._length(seq)
        new = [
            self._count(before + num_new_tokens, rank) - self._count(before, rank)
            for rank in range(len(self.ranks))
        ]
        for number, (rank, n) in enumerate(zip(self.ranks, new, strict=True)):
            needed = rank.blocks_needed(seq, min(n, num_new_tokens))
            if needed > rank.num_free:
                raise OutOfBlocks(
                    f"{num_new_tokens} more tokens of {seq!r}: {needed} free blocks needed on rank "
                    f"{number}, {rank.num_free} of {rank.num_blocks} free"
                )
        return tuple(rank.extend(seq, n) for rank, n in zip(self.ranks, new, strict=True))

    def fork(self, seq: Hashable, new_seq: Hashable | None = None) -> Hashable:
        """Starts a sequence with all of `seq`'s tokens, whose blocks it shares.

        Raises:
            ValueError: `seq` is unknown, or `new_seq` is in use.
        """
        new_seq = self.ranks[0].fork(seq, new_seq)
        for rank in self.ranks[1:]:
            rank.fork(seq, new_seq)
        return new_seq

    def truncate(self, seq: Hashable, num_tokens: int) -> None:
        """Shortens a sequence to its first `num_tokens` tokens and gives up the blocks past them.

        Raises:
            ValueError: `seq` is unknown, or `num_tokens` is negative or more than its length.
        """
        length = self._length(seq)
        if not 0 <= num_tokens <= length:
            raise ValueError(
                f"num_tokens must be between 0 and sequence {seq!r}'s length {length}, got "
                f"{num_tokens}"
            )
        for number, rank in enumerate(self.ranks):
            rank.truncate(seq, self._count(num_tokens, number))

    def free(self, seq: Hashable) -> None:
        """Ends a sequence; blocks that no other sequence holds become free.

        Raises:
            ValueError: `seq` is unknown.
        """
        for rank in self.ranks:
            rank.free(seq)

    def block_table(self, seqs: Iterable[Hashable | None], max_blocks: int) -> np.ndarray:
        """The block ids of a batch, int32 [b, size * max_blocks]: each rank's columns in turn.

        That is how `BlockTable.specs(context=)` splits them. See `BlockAllocator.block_table`.

        Raises:
            ValueError: a sequence is unknown, or holds more than `max_blocks` blocks on a rank.
        """
        seqs = list(seqs)
        return np.concatenate([rank.block_table(seqs, max_blocks) for rank in self.ranks], axis=1)

    def seqlens(self, seqs: Iterable[Hashable | None]) -> np.ndarray:
        """The lengths of a batch in tokens of the whole sequence, int32 [b]; 0 for None.

        Raises:
            ValueError: a sequence is unknown.
        """
        seqs = list(seqs)
        lengths = [rank.seqlens(seqs) for rank in self.ranks]
        return np.stack(lengths).sum(axis=0, dtype=np.int32)

    def _length(self, seq: Hashable) -> int:
        return int(self.seqlens([seq])[0])

    def _count(self, num_tokens: int, rank: int) -> int:
        """How many of a sequence's first `num_tokens` tokens a rank has."""
        return -((rank - num_tokens) // len(self.ranks))

    def __repr__(self) -> str:
        return f"ContextAllocator(size={len(self.ranks)}): {', '.join(map(repr, self.ranks))}"
