"""What a server calls, compiled: a model's step, its logits and the choice of tokens."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jax_flashmla import PagedCache
from jax_flashmla.serve.sampling import sample


@dataclasses.dataclass(frozen=True)
class Model:
    """What a server calls.

    Args:
        weights: a pytree of arrays, given to both functions.
        step: `step(weights, tokens, cache, slots, prefill=, prefix=) -> (cache, states)`: tokens
            [b, s] int32, the cache after the step's `advance`, which gave the slots; states
            [b, s, hidden]. `prefill` says whether these are prompts (s is padded, and the first
            slots.num_new count), `prefix` whether the cache may hold tokens before them. Both are
            static.
        logits: `logits(weights, states [n, hidden]) -> [n, vocab]` float32.
    """

    weights: Any
    step: Callable[..., tuple[PagedCache, jax.Array]]
    logits: Callable[[Any, jax.Array], jax.Array]


@functools.lru_cache(maxsize=8)
def jitted_step(step: Any, logits: Any, structure: jax.tree_util.PyTreeDef) -> Any:
    """Servers of one model share what has been compiled."""
    return jax.jit(
        functools.partial(_step, step, logits, structure),
        static_argnames=("prefill", "prefix", "greedy"),
        donate_argnames="cache",
    )


def _step(
    step: Callable[..., tuple[PagedCache, jax.Array]],
    logits: Callable[[Any, jax.Array], jax.Array],
    structure: jax.tree_util.PyTreeDef,
    weights: list[jax.Array],
    cache: PagedCache,
    tokens: jax.Array,
    num_new: jax.Array,
    sampling: tuple[jax.Array, ...],
    *,
    prefill: bool,
    prefix: bool,
    greedy: bool,
) -> tuple[PagedCache, jax.Array]:
    """The model's step: tokens [b, s] of which num_new [b] count -> those after each [b, s].

    Of a prefill, only those after the last that counts [b, 1].
    """
    tree = jax.tree.unflatten(structure, weights)
    cache, slots = cache.advance(tokens.shape[1], num_new)
    cache, states = step(tree, tokens, cache, slots, prefill=prefill, prefix=prefix)
    offsets = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    if prefill:
        offsets = jnp.maximum(slots.num_new - 1, 0)[:, None]
        states = jnp.take_along_axis(states, offsets[:, :, None], axis=1)
    b, s, hidden = states.shape
    scores = logits(tree, states.reshape(b * s, hidden))
    if greedy:
        return cache, jnp.argmax(scores, axis=-1).astype(jnp.int32).reshape(b, s)
    positions = (slots.positions[:, None] + offsets).reshape(b * s)
    each = [jnp.repeat(x, s) for x in sampling]
    return cache, sample(scores, positions, *each).reshape(b, s)
