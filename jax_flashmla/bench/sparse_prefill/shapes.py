"""One shape of sparse_prefill: what each query token attends, and what that computes and reads."""

from __future__ import annotations

from dataclasses import dataclass

D_V, ITEMSIZE = 512, 2


@dataclass(frozen=True, order=True)
class Shape:
    """One shape: each of s_q query tokens attends topk of s_kv rows; all indices are valid."""

    s_q: int
    h_q: int
    topk: int
    s_kv: int
    d_qk: int = 576

    def __str__(self) -> str:
        rope = "" if self.d_qk == 576 else f" d_qk={self.d_qk}"
        return f"s_q={self.s_q} h_q={self.h_q} topk={self.topk} of {self.s_kv}{rope}"

    @property
    def row_bytes(self) -> int:
        return self.d_qk * ITEMSIZE

    @property
    def gathered_tokens(self) -> int:
        """Rows that query tokens attend."""
        return self.s_q * self.topk

    @property
    def flops(self) -> int:
        """Of q k^T and p v over every row attended."""
        return 2 * (self.d_qk + D_V) * self.gathered_tokens * self.h_q

    @property
    def cache_bytes(self) -> int:
        """Of the rows attended, each once."""
        return min(self.gathered_tokens, self.s_kv) * self.row_bytes

    @property
    def gathered(self) -> dict[int, int]:
        return {self.row_bytes: self.cache_bytes}

    @property
    def bytes(self) -> int:
        """The rows read once, q read once, out written once."""
        return self.cache_bytes + ITEMSIZE * self.s_q * self.h_q * (self.d_qk + D_V)

    @property
    def facts(self) -> dict[str, int]:
        return {"gathered_tokens": self.gathered_tokens}
