"""One shape of dense_decode: how long its sequences are, and what it computes and reads."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np

D_QK, D_V, ITEMSIZE = 576, 512, 2
ROW_BYTES = {"dense": ITEMSIZE * D_QK, "v32": 656, "fp8_row": 576}
SHORT_LENGTH = 256  # tokens of all but one sequence where lengths == "skewed"


@dataclass(frozen=True, order=True)
class Shape:
    """One shape. `lengths` says how the b sequences' lengths follow from s_k:

    equal   every sequence has s_k tokens
    normal  max(1, N(s_k, s_k / 2)), seed 7
    skewed  one sequence of s_k tokens among b - 1 of SHORT_LENGTH

    `format` is the cache's.
    """

    b: int
    s_q: int
    h_q: int
    s_k: int
    lengths: str = "equal"
    format: str = "dense"

    def __str__(self) -> str:
        shape = f"b={self.b} s_q={self.s_q} h_q={self.h_q} s_k={self.s_k} {self.lengths}"
        return shape if self.format == "dense" else f"{shape} {self.format}"

    def seqlens(self) -> np.ndarray:
        """int32[b], tokens in each sequence's cache, those of the queries included."""
        if self.lengths == "equal":
            tokens = [self.s_k] * self.b
        elif self.lengths == "normal":
            generator = random.Random(7)
            drawn = (generator.normalvariate(self.s_k, self.s_k / 2) for _ in range(self.b))
            tokens = [max(1, int(n)) for n in drawn]
        elif self.lengths == "skewed":
            tokens = [SHORT_LENGTH] * self.b
            tokens[self.b // 2] = self.s_k
        else:
            raise ValueError(f"lengths must be equal, normal or skewed, got {self.lengths!r}")
        return np.asarray(tokens, np.int32)

    @property
    def cached_tokens(self) -> int:
        return int(self.seqlens().sum(dtype=np.int64))

    def num_blocks(self, block_size: int) -> int:
        """Blocks that one cache of this shape fills."""
        return int((-(-self.seqlens() // block_size)).sum())

    @property
    def flops(self) -> int:
        """Of q k^T and p v over every cached token; causal masking is not subtracted."""
        return 2 * (D_QK + D_V) * self.cached_tokens * self.s_q * self.h_q

    @property
    def cache_bytes(self) -> int:
        """Of the tokens in one cache."""
        return ROW_BYTES[self.format] * self.cached_tokens

    @property
    def bytes(self) -> int:
        """The cache read once, q read once, out written once."""
        q_and_out = self.b * self.s_q * self.h_q * (D_QK + D_V)
        return self.cache_bytes + ITEMSIZE * q_and_out

    @property
    def gathered(self) -> dict[int, int]:
        return {}  # whole blocks are read

    @property
    def facts(self) -> dict[str, int]:
        return {"cached_tokens": self.cached_tokens}
