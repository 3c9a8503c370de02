"""Context parallelism: token t of a sequence is on rank t mod size.

Of a sequence's first n tokens a rank has ceil((n - rank) / size): what a query sees of them is
still a prefix of the local ones, whose end is all that changes.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jax_flashmla import _checks, _limits


@dataclasses.dataclass(frozen=True)
class Context:
    """One rank of those that share the tokens of every sequence."""

    rank: jax.Array  # [] int32
    size: int

    def count(self, tokens: jax.Array) -> jax.Array:
        """How many of a sequence's first so many tokens are here, int32 of any shape.

        They are at most INT32_MAX - size, and may be negative.
        """
        return jnp.maximum(tokens + (self.size - 1 - self.rank), 0) // self.size

    def local_lengths(self, cache_seqlens: jax.Array, capacity: int | None = None) -> jax.Array:
        """Local tokens [b] of sequences with so many; capacity: what a local table's row holds."""
        return self.count(self.clamp(cache_seqlens, capacity))

    def clamp(self, cache_seqlens: jax.Array, capacity: int | None = None) -> jax.Array:
        """Lengths [b] within what all ranks together have room for; the same on each of them."""
        most = _limits.INT32_MAX - self.size
        if capacity is not None:
            most = min(most, capacity * self.size)
        return jnp.clip(cache_seqlens, 0, most)

    def seen(self, lengths: jax.Array, s_q: int) -> jax.Array:
        """Local tokens that each of s_q causal queries sees [b, s_q]; lengths: from `clamp`."""
        later = jnp.arange(s_q - 1, -1, -1, dtype=jnp.int32)
        return self.count(lengths[:, None] - later[None, :])

    def agree(self, capacity: jax.Array, axis: str) -> jax.Array:
        """Tokens that every rank can store its share of [b]; capacity: of this rank's blocks."""
        capacity = jnp.minimum(capacity, (_limits.INT32_MAX - self.size) // self.size)
        return jax.lax.pmin(capacity * self.size + self.rank, axis)

    def positions(self, local: jax.Array) -> jax.Array:
        """Positions in their sequences of local tokens; -1 stays."""
        return jnp.where(local < 0, -1, local * self.size + self.rank)


def as_context(context: Any) -> Context | None:
    """What a user passes as `context=`: None, or (rank, size); of one rank None."""
    if context is None:
        return None
    if not isinstance(context, tuple) or len(context) != 2:
        raise TypeError(f"context must be None or (rank, size), got {_checks.describe(context)}")
    rank, size = context
    size = _checks.check_int("context's size", size, 1, _limits.INT32_MAX)
    rank = _checks.as_first_block("context's rank", rank, size - 1)
    return None if size == 1 else Context(jnp.clip(rank, 0, size - 1), size)


def context_of(axis: str, name: str = "axis") -> Context | None:
    """Inside `jax.shard_map`, this device's rank among those of a mesh axis."""
    size = _checks.axis_size(name, axis)
    return as_context((jax.lax.axis_index(axis), size))
