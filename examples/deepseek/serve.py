"""The example's model behind `jax_flashmla.serve`: prompts in, tokens of all of them out."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from deepseek.config import ModelConfig
from deepseek.devices import everywhere
from deepseek.model import DeepSeek
from jax_flashmla import PagedCache, Peers, Scheduler, Slots, serve
from jax_flashmla.serve import Sampling, Stats


class Token(NamedTuple):
    """A new token of a prompt's sequence, and whether it is its last."""

    prompt: int
    id: int
    last: bool


class Server:
    """Generates from prompts, at most `batch` at a time.

    Args:
        config: the model's.
        model: the model, on one device or over those that it was loaded to.
        batch, max_tokens, num_blocks, stop_tokens, detokenize, draft: as for
            `jax_flashmla.serve.Server`.
        block_size: tokens of a block; 64 for the Hopper kernels.
        dtype: of the computation.
        cache_format: of the cache's rows, "dense" or "v32" (fp8).
        sampling: how tokens are chosen; each prompt has a seed of its own, made from its number.
        stop_strings: end a sequence with the token that completes one of them.

    Raises:
        ValueError: max_tokens is more than the model's positions, or another number out of range.
    """

    def __init__(
        self,
        config: ModelConfig,
        model: DeepSeek,
        *,
        batch: int,
        max_tokens: int,
        num_blocks: int | None = None,
        block_size: int = 64,
        dtype: DTypeLike = jnp.bfloat16,
        cache_format: str = "dense",
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        stop_tokens: frozenset[int] = frozenset(),
        stop_strings: Sequence[str] = (),
        detokenize: Callable[[list[int]], str] | None = None,
        draft: Any = None,
    ) -> None:
        if not 2 <= max_tokens <= config.max_positions:
            raise ValueError(
                f"max_tokens must be between 2 and the model's {config.max_positions} positions, "
                f"got {max_tokens}"
            )
        self._sampling, self._stop_strings = sampling, tuple(stop_strings)
        self._server = serve.Server(
            served(model),
            config.attention.cache_format(dtype, block_size, name=cache_format),
            layers=config.num_layers,
            index_format=config.attention.index_format(dtype),
            index_layers=config.index_layers,
            batch=batch,
            max_tokens=max_tokens,
            num_blocks=num_blocks,
            stop_tokens=stop_tokens,
            detokenize=detokenize,
            draft=draft,
            device=None if model.peers is None else everywhere(model.peers),
        )

    @property
    def stats(self) -> Stats:
        return self._server.stats

    @property
    def scheduler(self) -> Scheduler:
        return self._server.scheduler

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> Iterator[Token]:
        """Yields every new token of every prompt as it comes.

        Args:
            prompts: token ids of each, at least one.
            max_new_tokens: where a sequence ends that has met no stop token.

        Raises:
            ValueError: a prompt that is empty or too long, or no new tokens are asked for.
        """
        for i, prompt in enumerate(prompts):
            self._server.check(prompt, max_new_tokens, f"prompt {i}")
        numbers = {}
        for i, prompt in enumerate(prompts):
            seed = self._sampling.seed * 1_000_003 + i
            number = self._server.add(
                prompt,
                max_new_tokens,
                sampling=dataclasses.replace(self._sampling, seed=seed),
                stop_strings=self._stop_strings,
            )
            numbers[number] = i
        try:
            for token in self._server.stream():
                yield Token(numbers[token.request], token.id, token.last)
        finally:  # also where whoever reads the tokens stops early
            for number in numbers:
                self._server.cancel(number)


def served(model: DeepSeek) -> serve.Model:
    """The model as a server calls it."""
    graph, state = nnx.split(model)
    if model.peers is None:
        return serve.Model(state, *_functions(graph, None, ()))
    specs = tuple(weight.sharding.spec for weight in jax.tree.leaves(state))
    return serve.Model(state, *_functions(graph, model.peers, specs))


@functools.lru_cache(maxsize=8)
def _functions(
    graph: Any, peers: Peers | None, specs: tuple[P, ...]
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The same ones for the same model, so that its servers share what is compiled.

    Over peers, specs are the weights', in their order as a pytree's leaves.
    """

    def step(
        state: Any,
        tokens: jax.Array,
        cache: PagedCache,
        slots: Slots,
        *,
        prefill: bool,
        prefix: bool,
    ) -> tuple[PagedCache, jax.Array]:
        def call(state: Any, *arguments: Any) -> tuple[PagedCache, jax.Array]:
            return nnx.merge(graph, state)(*arguments, prefill=prefill, prefix=prefix)

        if peers is not None:
            weights = jax.tree.unflatten(jax.tree.structure(state), specs)
            call = jax.shard_map(
                call, mesh=peers.mesh, in_specs=(weights, P(), P(), P()), out_specs=P()
            )
        return call(state, tokens, cache, slots)

    # It has no custom call: XLA splits it by itself, as the head is split.
    def logits(state: Any, states: jax.Array) -> jax.Array:
        return nnx.merge(graph, state).logits(states)

    return step, logits
