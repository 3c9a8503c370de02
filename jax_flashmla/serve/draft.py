"""Drafts for speculation without a second model: what followed the last n tokens before."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

from jax_flashmla.serve.checks import at_least


@dataclasses.dataclass(frozen=True)
class NGramDraft:
    """Proposes the tokens that followed the latest earlier occurrence of a sequence's last n.

    Args:
        n: tokens that have to be the same.
        length: tokens to propose at most.

    Raises:
        TypeError, ValueError: what is no integer, or less than 1.

    >>> NGramDraft(n=2, length=3)([1, 2, 3, 4, 5, 1, 2])
    [3, 4, 5]
    """

    n: int = 2
    length: int = 3

    def __post_init__(self) -> None:
        for name in ("n", "length"):
            at_least(1, name, getattr(self, name))

    def __call__(self, tokens: Sequence[int]) -> list[int]:
        return self.follow(tokens)()

    def follow(self, tokens: Sequence[int]) -> Callable[[], list[int]]:
        """What proposes again and again for tokens that only grow, looking at each but once."""
        ends: dict[tuple[int, ...], int] = {}  # of each n tokens, the latest that others follow
        known = self.n

        def propose() -> list[int]:
            nonlocal known
            for end in range(known, len(tokens)):
                ends[tuple(tokens[end - self.n : end])] = end
            known = max(known, len(tokens))
            end = ends.get(tuple(tokens[-self.n :]), len(tokens))
            return list(tokens[end : end + self.length])

        return propose


def follow(draft: Any) -> Callable[[list[int]], Callable[[], Sequence[int]]]:
    """Of a draft, or of None, what `NGramDraft.follow` is of that one."""
    if draft is None:
        return lambda tokens: list
    return getattr(draft, "follow", lambda tokens: functools.partial(draft, tokens))
