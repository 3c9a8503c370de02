"""From logits to tokens."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen.

    Args:
        temperature: 0 for the likeliest token; else what logits are divided by.
        top_p: choose among the likeliest tokens whose probabilities reach this sum.
        seed: of the random choices. A prompt's choices do not depend on the others in its batch.

    Raises:
        ValueError: a number out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be at least 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be more than 0 and at most 1, got {self.top_p}")


GREEDY = Sampling()


def sample(
    sampling: Sampling, logits: jax.Array, prompts: jax.Array, positions: jax.Array
) -> jax.Array:
    """A token for each row.

    Args:
        sampling: static.
        logits: [b, vocab] float32.
        prompts: [b] int32, which prompt a row belongs to.
        positions: [b] int32, the position of the token before; with the prompt, it makes the key.

    Returns:
        Token ids [b] int32.
    """
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    if sampling.top_p < 1:
        order = jnp.argsort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        rank = jnp.argsort(order, axis=-1)
        kept = jnp.take_along_axis(before < sampling.top_p, rank, axis=-1)
        logits = jnp.where(kept, logits, -jnp.inf)

    def choose(row: jax.Array, prompt: jax.Array, position: jax.Array) -> jax.Array:
        key = jax.random.key(sampling.seed)
        key = jax.random.fold_in(jax.random.fold_in(key, prompt), position)
        return jax.random.categorical(key, row)

    return jax.vmap(choose)(logits, prompts, positions).astype(jnp.int32)
