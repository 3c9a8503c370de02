"""What an indexer is: the part of a layer that chooses which tokens it attends to."""

from __future__ import annotations

import dataclasses

import jax

from jax_flashmla import _checks, _limits
from jax_flashmla.layers.rope_config import set_numbers

INDEX_LAYOUTS = ("half", "interleaved", "deinterleaved")


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class IndexerConfig:
    """The indexer of sparse attention (DeepSeek-V3.2, arXiv:2512.02556). Static and hashable.

    A query token attends to the `topk` visible tokens of the highest
    `sum over heads of weight * relu(q . k)`; to all of them if they are no more than `topk`.

    Args:
        num_heads: heads of the index queries, at most 64.
        topk: tokens that are attended to, at most 4096.
        rope_layout: which of the first qk_rope_head_dim columns make a pair: "half" (V3.2), or
            "interleaved" or "deinterleaved" (GLM-5), as in `RopeConfig`; wavelengths are its.
        head_dim: columns of an index query and key; 128 where keys are stored in fp8.
        shared: for each layer of the model, whether it attends to what the last layer before it
            with an indexer selected (IndexShare), and has no indexer of its own. Empty: none is.
        hadamard: whether queries and keys are rotated by a Hadamard matrix before they are stored
            in fp8, which spreads outliers. Scores are the same but for rounding.
        norm_eps: epsilon of the keys' LayerNorm.

    Raises:
        TypeError, ValueError: a value that no indexer can have.
    """

    num_heads: int
    topk: int
    rope_layout: str
    head_dim: int = 128
    shared: tuple[bool, ...] = ()
    hadamard: bool = True
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        for name, most in (
            ("num_heads", 64),
            ("topk", _limits.MAX_TOPK),
            ("head_dim", _limits.INT32_MAX),
        ):
            value = _checks.check_int(f"indexer.{name}", getattr(self, name), 1, most)
            object.__setattr__(self, name, value)
        if self.rope_layout not in INDEX_LAYOUTS:
            raise ValueError(
                f"indexer.rope_layout must be one of {INDEX_LAYOUTS}, got {self.rope_layout!r}"
            )
        if not isinstance(self.hadamard, bool):
            raise TypeError(f"indexer.hadamard must be a bool, got {self.hadamard!r}")
        if self.hadamard and self.head_dim & (self.head_dim - 1):
            raise ValueError(
                f"indexer.head_dim must be a power of two with hadamard, got {self.head_dim}"
            )
        shared = tuple(self.shared) if isinstance(self.shared, list | tuple) else None
        if shared is None or not all(isinstance(x, bool) for x in shared):
            raise TypeError(f"indexer.shared must be a tuple of bools, got {self.shared!r}")
        if shared and shared[0]:
            raise ValueError(
                "indexer.shared must begin with False, as no layer is before the first one, got "
                f"{shared}"
            )
        object.__setattr__(self, "shared", shared)
        set_numbers(self, "indexer.", ("norm_eps",))

    def is_shared(self, layer: int) -> bool:
        """Whether a layer of the model has no indexer of its own; those past the last one have."""
        layer = _checks.check_int("layer", layer, 0, _limits.INT32_MAX)
        return layer < len(self.shared) and self.shared[layer]

    def index_layer(self, layer: int) -> int:
        """The layer of the index pool that a layer of the model writes: how many before it do.

        Also the number of layers that an index pool for the first `layer` layers needs.
        """
        layer = _checks.check_int("layer", layer, 0, _limits.INT32_MAX)
        return layer - sum(self.shared[:layer])
