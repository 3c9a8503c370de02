"""Drafts for speculation without a second model: what followed the last n tokens before."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

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
        tokens = list(tokens)
        last = tokens[-self.n :]
        for start in range(len(tokens) - self.n - 1, -1, -1):
            if tokens[start : start + self.n] == last:
                return tokens[start + self.n : start + self.n + self.length]
        return []
