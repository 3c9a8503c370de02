"""From logits to tokens, each row with its own temperature, cuts and seed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jax_flashmla._checks import FLOAT32_MAX
from jax_flashmla._limits import INT32_MAX
from jax_flashmla.cache.allocator import as_integer
from jax_flashmla.serve.checks import at_least, check_real


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a request's tokens are chosen.

    Args:
        temperature: 0 for the likeliest token; else what logits are divided by.
        top_k: choose among so many likeliest tokens; 0 for all.
        top_p: choose among the likeliest tokens whose probabilities reach this sum.
        seed: of the random choices, taken modulo 2^32. They depend on it, the position and the
            logits alone, not on the batch.

    Raises:
        TypeError, ValueError: a number of another type, or out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_real("temperature", self.temperature)
        check_real("top_p", self.top_p)
        if not 0 <= self.temperature <= FLOAT32_MAX:
            raise ValueError(
                f"temperature must be at least 0 and finite in float32, got {self.temperature}"
            )
        if at_least(0, "top_k", self.top_k) > INT32_MAX:
            raise ValueError(f"top_k must fit in int32, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be more than 0 and at most 1, got {self.top_p}")
        as_integer("seed", self.seed)


def sample(
    logits: jax.Array,
    positions: jax.Array,
    temperature: jax.Array,
    top_k: jax.Array,
    top_p: jax.Array,
    seeds: jax.Array,
) -> jax.Array:
    """A token for each row.

    Args:
        logits: [n, vocab] float32.
        positions: [n] int32, the position of the token before; with the seed, it makes the key.
        temperature: [n] float32.
        top_k: [n] int32.
        top_p: [n] float32.
        seeds: [n] uint32.

    Returns:
        Token ids [n] int32.
    """
    order = jnp.argsort(logits, axis=-1, descending=True)  # stable: the earlier of equal ones wins
    scaled = logits / jnp.where(temperature > 0, temperature, jnp.float32(1))[:, None]
    in_order = jnp.take_along_axis(scaled, order, axis=-1)
    probabilities = jax.nn.softmax(in_order, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    rank = jnp.arange(logits.shape[-1], dtype=jnp.int32)[None]
    most = jnp.where(top_k > 0, top_k, logits.shape[-1])[:, None]
    kept = (rank < most) & (before < top_p[:, None])
    in_order = jnp.where(kept, in_order, -jnp.inf)

    def choose(row: jax.Array, seed: jax.Array, position: jax.Array) -> jax.Array:
        return jax.random.categorical(jax.random.fold_in(jax.random.key(seed), position), row)

    chosen = jax.vmap(choose)(in_order, seeds, positions).astype(jnp.int32)
    chosen = jnp.where(temperature > 0, chosen, jnp.int32(0))
    return jnp.take_along_axis(order, chosen[:, None], axis=-1)[:, 0].astype(jnp.int32)


def sampling_arrays(batch: Sequence[Sampling | None]) -> tuple[jax.Array, ...]:
    """temperature, top_k, top_p, seeds, [n] each, as `sample` takes them; None is greedy."""
    each = [sampling or Sampling() for sampling in batch]
    return (
        jnp.array([s.temperature for s in each], jnp.float32),
        jnp.array([s.top_k for s in each], jnp.int32),
        jnp.array([s.top_p for s in each], jnp.float32),
        jnp.array([s.seed % 2**32 for s in each], jnp.uint32),
    )
