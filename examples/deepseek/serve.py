"""Continuous batching: prompts take the places of sequences that have ended, in one paged cache."""

from __future__ import annotations

import collections
import dataclasses
import functools
import time
from collections.abc import Hashable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from deepseek.config import ModelConfig
from deepseek.model import DeepSeek
from deepseek.sampling import GREEDY, Sampling, sample
from jax_flashmla import BlockAllocator, BlockTable, OutOfBlocks, PagedCache

SHORTEST_PREFILL = 16  # tokens that prompts are padded to at least; then powers of two


class Token(NamedTuple):
    """A new token of a prompt's sequence, and whether it is its last."""

    prompt: int
    id: int
    last: bool


@dataclasses.dataclass
class Stats:
    """Tokens and seconds; the first run of a step with a new shape, which compiles it, is apart."""

    prompt_tokens: int = 0
    prefill_seconds: float = 0.0
    decoded_tokens: int = 0
    decode_seconds: float = 0.0
    compile_seconds: float = 0.0
    most_active: int = 0


@dataclasses.dataclass
class _Sequence:
    prompt: int  # its number
    blocks: Hashable  # its id in the allocator
    place: int  # in the batch
    cached: int  # tokens in the cache
    newest: int  # its last token, not in the cache yet
    left: int  # tokens that it may still get


@dataclasses.dataclass
class _Batch:
    """What a step is given beside the cache, on the device."""

    num_new: jax.Array  # [b] int32, tokens that each sequence brings
    prompts: jax.Array  # [b] int32, the number of each one's prompt
    newest: jax.Array  # [b] int32, the token that each one has got last


class Server:
    """Generates from prompts, at most `batch` at a time.

    A prompt is admitted when there are a free place in the batch and enough free blocks for all
    that it may grow to, so that no sequence ever runs out of blocks; what it did not need is freed
    with it. Admitted prompts are prefilled together; then every sequence advances by a token a
    step. The host reads one token for each sequence a step, and nothing else.

    Args:
        config: the model's.
        model: the model.
        batch: places in the batch.
        max_tokens: of a sequence, prompt and generated.
        num_blocks: of the cache, in each layer; by default enough for `batch` of the longest
            sequences.
        block_size: tokens of a block; 64 for the Hopper kernels.
        dtype: of the cache.
        sampling: how tokens are chosen.
        stop_tokens: end a sequence.

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
        sampling: Sampling = GREEDY,
        stop_tokens: frozenset[int] = frozenset(),
    ) -> None:
        if batch < 1:
            raise ValueError(f"batch must be at least 1, got {batch}")
        if not 2 <= max_tokens <= config.max_positions:
            raise ValueError(
                f"max_tokens must be between 2 and the model's {config.max_positions} positions, "
                f"got {max_tokens}"
            )
        self.max_tokens, self.stop_tokens, self.stats = max_tokens, stop_tokens, Stats()
        self._max_blocks = -(-max_tokens // block_size)
        num_blocks = batch * self._max_blocks if num_blocks is None else num_blocks
        self.allocator = BlockAllocator(num_blocks, block_size)
        table = BlockTable.create(
            np.full((batch, self._max_blocks), -1, np.int32), block_size=block_size
        )
        self.cache = PagedCache.create(
            config.attention.cache_format(dtype, block_size),
            table,
            num_blocks=num_blocks,
            layers=config.num_layers,
        )
        self._places: list[_Sequence | None] = [None] * batch
        self._batch: _Batch | None = None  # of the places; made anew when they have changed
        graph, state = nnx.split(model)
        # A list is faster to pass to a jitted function, at every step, than modules are.
        self._weights, structure = jax.tree.flatten(state)
        self._step = jax.jit(
            functools.partial(_step, graph, structure, sampling),
            static_argnames="prefill",
            donate_argnames="cache",
        )
        self._compiled: set[tuple[bool, tuple[int, ...]]] = set()

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> Iterator[Token]:
        """Yields every new token of every prompt as it comes.

        Args:
            prompts: token ids of each, at least one.
            max_new_tokens: where a sequence ends that has met no stop token.

        Raises:
            ValueError: a prompt that is empty or too long, or no new tokens are asked for.
        """
        self._check(prompts, max_new_tokens)
        waiting = collections.deque(enumerate(prompts))
        try:
            while waiting or any(self._places):
                if admitted := self._admit(waiting, max_new_tokens):
                    yield from self._prefill(admitted, prompts)
                if any(self._places):
                    yield from self._decode()
        finally:  # also where whoever reads the tokens stops early
            for sequence in filter(None, self._places):
                self._end(sequence)

    def _check(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        capacity = self.allocator.num_blocks * self.allocator.block_size
        for i, prompt in enumerate(prompts):
            if not prompt:
                raise ValueError(f"prompt {i} must have at least one token, got none")
            total = len(prompt) + max_new_tokens
            if total > self.max_tokens:
                raise ValueError(
                    f"prompt {i} is too long: {len(prompt)} tokens and max_new_tokens = "
                    f"{max_new_tokens} are {total}, more than max_tokens = {self.max_tokens}"
                )
            if total > capacity:
                raise ValueError(
                    f"prompt {i} needs a cache of {total} tokens, the whole cache has {capacity}"
                )

    def _admit(
        self, waiting: collections.deque[tuple[int, Sequence[int]]], max_new_tokens: int
    ) -> list[_Sequence]:
        """Gives places to as many waiting prompts as fit, in order."""
        admitted = []
        for place in [i for i, taken in enumerate(self._places) if taken is None]:
            if not waiting:
                break
            number, prompt = waiting[0]
            try:  # the last token is never written to the cache
                blocks = self.allocator.allocate(len(prompt) + max_new_tokens - 1)
            except OutOfBlocks:
                break
            waiting.popleft()
            sequence = _Sequence(number, blocks, place, cached=0, newest=-1, left=max_new_tokens)
            self._places[place] = sequence
            admitted.append(sequence)
        self._batch = None if admitted else self._batch
        active = sum(sequence is not None for sequence in self._places)
        self.stats.most_active = max(self.stats.most_active, active)
        return admitted

    def _prefill(self, admitted: list[_Sequence], prompts: Sequence[Sequence[int]]) -> list[Token]:
        """The admitted prompts as a batch of their own, padded to one of few shapes."""
        lengths = [len(prompts[sequence.prompt]) for sequence in admitted]
        width = max(_power_of_two(max(lengths)), SHORTEST_PREFILL)
        padding = _power_of_two(len(admitted)) - len(admitted)
        tokens = np.zeros((len(admitted) + padding, width), np.int32)
        for row, sequence in enumerate(admitted):
            tokens[row, : lengths[row]] = prompts[sequence.prompt]
        batch = self._make_batch([*admitted, *[None] * padding], [*lengths, *[0] * padding])
        chosen, seconds = self._run(tokens, batch, prefill=True)
        self.stats.prompt_tokens += sum(lengths) if seconds else 0
        self.stats.prefill_seconds += seconds
        return self._take(admitted, lengths, chosen)

    def _decode(self) -> list[Token]:
        """One step of the whole batch."""
        active = [sequence for sequence in self._places if sequence is not None]
        if self._batch is None:
            ones = [0 if sequence is None else 1 for sequence in self._places]
            self._batch = self._make_batch(self._places, ones)
        chosen, seconds = self._run(self._batch.newest[:, None], self._batch, prefill=False)
        self.stats.decoded_tokens += len(active) if seconds else 0
        self.stats.decode_seconds += seconds
        return self._take(active, [1] * len(active), chosen[[s.place for s in active]])

    def _make_batch(self, sequences: Sequence[_Sequence | None], num_new: list[int]) -> _Batch:
        """Makes these the batch that the cache is of."""
        self.cache = self.cache.with_table(
            self.allocator.block_table(
                [None if s is None else s.blocks for s in sequences], self._max_blocks
            ),
            np.array([s.cached if s else 0 for s in sequences], np.int32),
        )
        prompts, newest = (
            jnp.array([getattr(s, name) if s else 0 for s in sequences], jnp.int32)
            for name in ("prompt", "newest")
        )
        return _Batch(jnp.array(num_new, jnp.int32), prompts, newest)

    def _run(
        self, tokens: np.ndarray | jax.Array, batch: _Batch, *, prefill: bool
    ) -> tuple[np.ndarray, float]:
        """A step; the tokens chosen [b], and its seconds, or 0 where it was compiled first."""
        start = time.perf_counter()
        self.cache, batch.newest = self._step(
            self._weights, self.cache, tokens, batch.num_new, batch.prompts, prefill=prefill
        )
        chosen = np.asarray(batch.newest)  # waits for the device
        seconds = time.perf_counter() - start
        if (prefill, tokens.shape) in self._compiled:
            return chosen, seconds
        self._compiled.add((prefill, tokens.shape))
        self.stats.compile_seconds += seconds
        return chosen, 0.0

    def _take(
        self, sequences: list[_Sequence], num_new: list[int], chosen: np.ndarray
    ) -> list[Token]:
        """Gives each sequence the token chosen for it, and frees those that end with it."""
        tokens = []
        for sequence, new, token in zip(sequences, num_new, chosen.tolist(), strict=False):
            sequence.cached += new
            sequence.newest = token
            sequence.left -= 1
            ended = sequence.left == 0 or token in self.stop_tokens
            tokens.append(Token(sequence.prompt, token, ended))
            if ended:
                self._end(sequence)
        return tokens

    def _end(self, sequence: _Sequence) -> None:
        self.allocator.free(sequence.blocks)
        self._places[sequence.place] = None
        self._batch = None


def _step(
    graph: nnx.GraphDef,
    structure: jax.tree_util.PyTreeDef,
    sampling: Sampling,
    weights: list[jax.Array],
    cache: PagedCache,
    tokens: jax.Array,
    num_new: jax.Array,
    prompts: jax.Array,
    *,
    prefill: bool,
) -> tuple[PagedCache, jax.Array]:
    """The model's step: tokens [b, s] of which num_new [b] count -> the next ones [b]."""
    model = nnx.merge(graph, jax.tree.unflatten(structure, weights))
    cache, slots = cache.advance(tokens.shape[1], num_new)
    cache, states = model(tokens, cache, slots, prefill=prefill)
    last = jnp.maximum(slots.num_new - 1, 0)
    states = jnp.take_along_axis(states, last[:, None, None], axis=1)[:, 0]
    logits = model.logits(states)
    return cache, sample(sampling, logits, prompts, slots.positions + last)


def _power_of_two(n: int) -> int:
    """The least one that is at least n."""
    return 1 << (n - 1).bit_length()
