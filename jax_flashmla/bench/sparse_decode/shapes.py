"""One shape of sparse_decode: what each query token attends, and what that computes and reads."""

from __future__ import annotations

from dataclasses import dataclass

D_V, ITEMSIZE = 512, 2
FORMATS = {"v32": (576, 656), "v4": (512, 584), "dense": (576, 1152), "v32_nope": (512, 528)}


@dataclass(frozen=True, order=True)
class Shape:
    """One shape: each of b * s_q query tokens attends topk tokens of its sequence's cache and
    extra_topk of its extra one, both of s_k tokens in `format`; all indices are valid."""

    b: int
    s_q: int
    h_q: int
    topk: int
    extra_topk: int = 0
    format: str = "v32"
    s_k: int = 16384

    def __str__(self) -> str:
        extra = f"+{self.extra_topk}" if self.extra_topk else ""
        return f"b={self.b} s_q={self.s_q} h_q={self.h_q} topk={self.topk}{extra} {self.format}"

    @property
    def d_qk(self) -> int:
        return FORMATS[self.format][0]

    @property
    def row_bytes(self) -> int:
        return FORMATS[self.format][1]

    @property
    def query_tokens(self) -> int:
        return self.b * self.s_q

    @property
    def gathered_tokens(self) -> int:
        """Rows that query tokens attend."""
        return self.query_tokens * (self.topk + self.extra_topk)

    @property
    def flops(self) -> int:
        """Of q k^T and p v over every row attended."""
        return 2 * (self.d_qk + D_V) * self.gathered_tokens * self.h_q

    @property
    def cache_bytes(self) -> int:
        """Of the rows attended, none of which a sequence can have more often than tokens."""
        rows = sum(min(self.s_q * topk, self.s_k) for topk in (self.topk, self.extra_topk))
        return self.b * rows * self.row_bytes

    @property
    def gathered(self) -> dict[int, int]:
        return {self.row_bytes: self.cache_bytes}

    @property
    def bytes(self) -> int:
        """The rows read once, q read once, out written once."""
        q_and_out = self.query_tokens * self.h_q * (self.d_qk + D_V)
        return self.cache_bytes + ITEMSIZE * q_and_out

    @property
    def facts(self) -> dict[str, int]:
        return {"query_tokens": self.query_tokens, "gathered_tokens": self.gathered_tokens}
