"""One decoding step of an attention layer: which model's, how many heads, what it reads."""

from __future__ import annotations

from dataclasses import dataclass

INDEX_HEADS, TOPK = 64, 2048
ITEMSIZE = 2  # of weights
# A model's widths: hidden_size, q_lora_rank, nope, v. "tiny" is for tests of the benchmark itself.
WIDTHS = {
    "v3": (7168, 1536, 128, 128),
    "v32": (7168, 1536, 128, 128),
    "tiny": (64, 32, 16, 16),
    "tiny_v32": (64, 32, 16, 16),
}
BIG_LAYER, LAYERS, FEW_LAYERS = 1_000_000_000, 16, 4


@dataclass(frozen=True, order=True)
class Shape:
    """b sequences of s_k tokens, the new one included, through one layer with h_q heads.

    `model` is "v3" (DeepSeek V3: dense attention over a bfloat16 cache) or "v32" (V3.2: indexer,
    selection and sparse attention over an fp8 cache). Fewer heads than 128 are one device's share.
    """

    b: int
    h_q: int
    s_k: int
    model: str = "v3"

    def __str__(self) -> str:
        return f"b={self.b} h_q={self.h_q} s_k={self.s_k} {self.model}"

    @property
    def sparse(self) -> bool:
        return self.model.endswith("v32")

    @property
    def layers(self) -> int:
        """Layers of one step, each with weights and a cache of its own."""
        return LAYERS if self.cache_bytes < BIG_LAYER else FEW_LAYERS

    @property
    def attended(self) -> int:
        """Tokens that each query attends to."""
        return min(TOPK, self.s_k) if self.sparse else self.s_k

    @property
    def weight_bytes(self) -> int:
        """Of the layer's matrices."""
        hidden, rank, nope, v = WIDTHS[self.model]
        down = hidden * (rank + 576)
        heads = self.h_q * (rank * (nope + 64) + 512 * (nope + v) + v * hidden)
        indexer = 0
        if self.sparse:  # the weights of its heads are float32
            indexer = rank * 128 * INDEX_HEADS + hidden * (128 + 2 * INDEX_HEADS)
        return ITEMSIZE * (down + heads + indexer)

    @property
    def flops(self) -> int:
        """Of the matrices and of attention to the tokens attended."""
        indexer = 2 * 128 * INDEX_HEADS * self.s_k if self.sparse else 0
        attention = 2 * (576 + 512) * self.h_q * self.attended
        return self.b * (self.weight_bytes + attention + indexer)

    @property
    def cache_bytes(self) -> int:
        """Of a layer's cache and index keys."""
        return self.b * self.s_k * ((656 + 132) if self.sparse else 1152)

    @property
    def bytes(self) -> int:
        """The weights, the tokens attended and the index keys, once."""
        row = 656 if self.sparse else 1152
        keys = 132 * self.s_k if self.sparse else 0
        return self.weight_bytes + self.b * (self.attended * row + keys)

    @property
    def gathered(self) -> dict[int, int]:
        return {}  # the attention kernels are timed, not modelled

    @property
    def facts(self) -> dict[str, int]:
        return {"layers": self.layers, "weight_bytes": self.weight_bytes}
