"""Which full blocks hold which tokens, by chained hashes: for automatic prefix caching."""

from __future__ import annotations

import collections
import hashlib
from collections.abc import Sequence

import numpy as np


class PrefixCache:
    """Full blocks by the hash of their tokens and of all tokens before them.

    It also says which block to evict: of those that no sequence holds, the least recently used, and
    of one prefix the last block first, as a block is of no use without those before it.
    """

    def __init__(self) -> None:
        self._blocks: dict[bytes, int] = {}
        self._hashes: dict[int, bytes] = {}
        self._idle: collections.OrderedDict[int, None] = collections.OrderedDict()  # oldest first

    def __len__(self) -> int:
        return len(self._blocks)

    def __contains__(self, block: int) -> bool:
        return block in self._hashes

    @property
    def num_idle(self) -> int:
        """Blocks that can be evicted."""
        return len(self._idle)

    def match(self, hashes: Sequence[bytes]) -> list[int]:
        """The blocks of the longest cached prefix."""
        found = []
        for digest in hashes:
            block = self._blocks.get(digest)
            if block is None:
                break
            found.append(block)
        return found

    def add(self, digest: bytes, block: int) -> bool:
        """Caches a block in use; False where its tokens are cached already, in it or another."""
        if digest in self._blocks or block in self._hashes:
            return False
        self._blocks[digest], self._hashes[block] = block, digest
        return True

    def remove(self, block: int) -> None:
        """Forgets a cached block."""
        del self._blocks[self._hashes.pop(block)]
        self._idle.pop(block, None)

    def use(self, blocks: Sequence[int]) -> None:
        """Sequences hold these: they cannot be evicted."""
        for block in blocks:
            self._idle.pop(block, None)

    def leave(self, blocks: Sequence[int]) -> None:
        """No sequence holds these any more, given in the order of their tokens."""
        for block in reversed(blocks):
            self._idle[block] = None

    def oldest(self, count: int, besides: Sequence[int] = ()) -> list[int] | None:
        """The blocks to evict next, none of `besides`; None where there are not so many."""
        spared = set(besides) & self._idle.keys()
        if count > len(self._idle) - len(spared):
            return None
        victims = (block for block in self._idle if block not in spared)
        return [block for block, _ in zip(victims, range(count), strict=False)]


def chain(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The hash of a block of tokens that follows what has the hash `parent`."""
    return hashlib.sha256(parent + np.asarray(tokens, np.int64).tobytes()).digest()
