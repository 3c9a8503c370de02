"""One shape of index_scores or index_topk: how many tokens are scored, and what that reads."""

from __future__ import annotations

from dataclasses import dataclass

COLUMNS, KEY_BYTES, BLOCK_SIZE = 128, 132, 64
LAUNCH_US = 2.0  # of a kernel, before its first key is there


@dataclass(frozen=True, order=True)
class ScoresShape:
    """s_q query tokens of e4m3 in each of b sequences of s_k tokens, causal."""

    b: int
    s_q: int
    heads: int
    s_k: int

    def __str__(self) -> str:
        return f"b={self.b} s_q={self.s_q} heads={self.heads} s_k={self.s_k}"

    @property
    def overhead_us(self) -> float:
        """Of the limit model, instead of attention's."""
        return LAUNCH_US

    @property
    def tokens(self) -> int:
        """Of all sequences."""
        return self.b * self.s_k

    @property
    def scores(self) -> int:
        """How many there are, causal masking aside."""
        return self.s_q * self.tokens

    @property
    def flops(self) -> int:
        """Of the products; e4m3 ones are half as much work as the bfloat16 ones of the limit."""
        return COLUMNS * self.heads * self.scores

    @property
    def cache_bytes(self) -> int:
        """Of the keys."""
        return KEY_BYTES * self.tokens

    @property
    def gathered(self) -> dict[int, int]:
        """Blocks are large: none."""
        return {}

    @property
    def bytes(self) -> int:
        """Keys and queries read, scores written."""
        return self.cache_bytes + self.b * self.s_q * self.heads * COLUMNS + 4 * self.scores

    @property
    def facts(self) -> dict[str, int]:
        return {"tokens": self.tokens}


@dataclass(frozen=True, order=True)
class TopkShape(ScoresShape):
    """The topk best of them are selected. heads = 0: of scores that are given."""

    topk: int = 2048

    def __str__(self) -> str:
        return f"{super().__str__()} topk={self.topk}"

    @property
    def given(self) -> bool:
        """Whether scores are given."""
        return self.heads == 0

    @property
    def overhead_us(self) -> float:
        return LAUNCH_US if self.given else 2 * LAUNCH_US

    @property
    def cache_bytes(self) -> int:
        """Of the keys, or of the scores."""
        return 4 * self.scores if self.given else super().cache_bytes

    @property
    def bytes(self) -> int:
        """Keys and queries, or scores, read; slots and positions written."""
        queries = self.b * self.s_q * self.heads * COLUMNS
        return self.cache_bytes + queries + 8 * self.b * self.s_q * self.topk
