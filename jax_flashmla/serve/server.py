"""Continuous batching: requests take the places of those that have ended, in one paged cache."""

from __future__ import annotations

import collections
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_flashmla import BlockTable, CacheFormat, OutOfBlocks, PagedCache, Scheduler
from jax_flashmla.serve.request import Request, Stats, Token, sampling_of
from jax_flashmla.serve.sampling import Sampling, sample

SHORTEST_PREFILL = 16  # tokens that prompts are padded to at least; then powers of two


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


class Server:
    """Generates for requests, at most `batch` at a time.

    A request is admitted when there are a free place and blocks for all that it may grow to, so
    that no sequence ever runs out of blocks. Admitted prompts are prefilled together, but for what
    the cache holds of them already; then every sequence advances a step at a time, by one token or,
    with a draft, by as many as are accepted. A draft never changes which tokens are chosen.

    Args:
        model: the model.
        format: of the cache's rows.
        layers: of the cache.
        batch: places in the batch.
        max_tokens: of a sequence, prompt and generated.
        num_blocks: of the cache, in each layer; by default enough for `batch` of the longest
            sequences.
        index_format, index_layers: of the cache's index pool, for a model with an indexer, as
            `PagedCache.create` takes them; by default there is none.
        stop_tokens: end every sequence.
        prefix_caching: whether requests share the blocks of equal beginnings.
        draft: `draft(tokens) -> proposed tokens`, for speculation; with `length`, the most that it
            proposes: see `NGramDraft`.
        detokenize: `detokenize(tokens) -> text`, for stop strings.
        device: a `jax.Device` or `jax.sharding.Sharding` for the cache, where the weights are
            not on JAX's default device.

    Raises:
        ValueError: a number out of range.
    """

    def __init__(
        self,
        model: Model,
        format: CacheFormat,
        *,
        layers: int,
        batch: int,
        max_tokens: int,
        num_blocks: int | None = None,
        index_format: CacheFormat | None = None,
        index_layers: int | None = None,
        stop_tokens: Sequence[int] | frozenset[int] = (),
        prefix_caching: bool = True,
        draft: Any = None,
        detokenize: Callable[[list[int]], str] | None = None,
        device: Any = None,
    ) -> None:
        if batch < 1:
            raise ValueError(f"batch must be at least 1, got {batch}")
        if max_tokens < 2:
            raise ValueError(f"max_tokens must be at least 2, got {max_tokens}")
        self.max_tokens, self.stop_tokens = max_tokens, frozenset(stop_tokens)
        self.stats = Stats()
        self._max_blocks = -(-max_tokens // format.block_size)
        num_blocks = batch * self._max_blocks if num_blocks is None else num_blocks
        self.scheduler = Scheduler(num_blocks, format.block_size, prefix_caching=prefix_caching)
        table = BlockTable.create(
            np.full((batch, self._max_blocks), -1, np.int32), block_size=format.block_size
        )
        self.cache = PagedCache.create(
            format,
            table,
            num_blocks=num_blocks,
            layers=layers,
            index_format=index_format,
            index_layers=index_layers,
            device=device,
        )
        self._draft, self._detokenize, self._device = draft, detokenize, device
        self._waiting: collections.deque[Request] = collections.deque()
        self._places: list[Request | None] = [None] * batch
        self._sampling: tuple[jax.Array, ...] | None = None  # of the places; None: they changed
        self._next_number = 0
        # A list is faster to pass to a jitted function, at every step, than most pytrees are.
        self._weights, structure = jax.tree.flatten(model.weights)
        self._step = _jitted(model.step, model.logits, structure)
        self._compiled: set[tuple] = set()

    @property
    def active(self) -> int:
        """Requests that have a place."""
        return sum(request is not None for request in self._places)

    @property
    def waiting(self) -> int:
        """Requests that wait for one."""
        return len(self._waiting)

    def check(self, prompt: Sequence[int], max_new_tokens: int, name: str = "prompt") -> None:
        """Raises ValueError where `add` would: the prompt is empty, or there is too little room."""
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        if not len(prompt):
            raise ValueError(f"{name} must have at least one token, got none")
        total = len(prompt) + max_new_tokens
        if total > self.max_tokens:
            raise ValueError(
                f"{name} is too long: {len(prompt)} tokens and max_new_tokens = {max_new_tokens} "
                f"are {total}, more than max_tokens = {self.max_tokens}"
            )
        capacity = self.scheduler.allocator.num_blocks * self.scheduler.allocator.block_size
        if total > capacity:
            raise ValueError(
                f"{name} needs a cache of {total} tokens, the whole cache has {capacity}"
            )

    def add(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        *,
        sampling: Sampling | None = None,
        stop_tokens: Sequence[int] = (),
        stop_strings: Sequence[str] = (),
    ) -> int:
        """Queues a request.

        Args:
            prompt: token ids, at least one.
            max_new_tokens: where it ends if nothing else ends it.
            sampling: how its tokens are chosen; the likeliest by default.
            stop_tokens: end it, beside the server's. The stop token is its last token.
            stop_strings: end it with the token that completes one of them.

        Returns:
            The request's number, which its tokens carry.

        Raises:
            ValueError: see `check`; or an empty stop string, or one without `detokenize`.
        """
        self.check(prompt, max_new_tokens)
        if stop_strings and self._detokenize is None:
            raise ValueError("stop_strings need a server with detokenize, got one without")
        if isinstance(stop_strings, str) or not all(stop_strings):
            raise ValueError(f"stop_strings must be non-empty strings, got {stop_strings!r}")
        number, self._next_number = self._next_number, self._next_number + 1
        self._waiting.append(
            Request(
                number,
                [int(token) for token in prompt],
                len(prompt),
                max_new_tokens,
                sampling or Sampling(),
                self.stop_tokens | frozenset(stop_tokens),
                tuple(stop_strings),
            )
        )
        return number

    def cancel(self, number: int) -> bool:
        """Ends a request, waiting or active; False where it has ended already."""
        for request in [*self._waiting, *self._places]:
            if request is not None and request.number == number:
                self.stats.cancelled += 1
                if request.place < 0:
                    self._waiting.remove(request)
                else:
                    self._end(request)
                return True
        return False

    def step(self) -> list[Token]:
        """Prefills what can be admitted, or advances every sequence; the new tokens."""
        if admitted := self._admit():
            return self._prefill(admitted)
        return self._decode() if self.active else []

    def stream(self) -> Iterator[Token]:
        """Yields every new token as it comes, until no request is left; more may be added."""
        while self._waiting or self.active:
            yield from self.step()

    def _admit(self) -> list[Request]:
        """Gives places to as many waiting requests as fit, in order."""
        admitted = []
        for place in [i for i, taken in enumerate(self._places) if taken is None]:
            if not self._waiting:
                break
            request = self._waiting[0]
            try:  # the last token is never written to the cache
                request.seq = self.scheduler.start(request.tokens, room=request.max_new_tokens - 1)
            except OutOfBlocks:
                break
            self._waiting.popleft()
            request.place, self._places[place] = place, request
            admitted.append(request)
        if admitted:
            self._sampling = None
        self.stats.most_active = max(self.stats.most_active, self.active)
        return admitted

    def _prefill(self, admitted: list[Request]) -> list[Token]:
        """The admitted prompts as a batch of their own, padded to one of few shapes."""
        cached = [self.scheduler.length(request.seq) for request in admitted]
        news = [request.tokens[n:] for request, n in zip(admitted, cached, strict=True)]
        self.stats.cached_tokens += sum(cached)
        batch = [*admitted, *[None] * (_power_of_two(len(admitted)) - len(admitted))]
        width = max(_power_of_two(max(map(len, news))), SHORTEST_PREFILL)
        self._sampling = None
        self._set_table(batch)
        chosen, seconds = self._run(
            batch, news, width, sampling_of(batch), prefill=True, prefix=any(cached)
        )
        self.stats.prompt_tokens += sum(map(len, news)) if seconds else 0
        self.stats.prefill_seconds += seconds
        tokens = []
        for row, (request, new) in enumerate(zip(admitted, news, strict=True)):
            self.scheduler.commit(request.seq, new)
            tokens += self._take(request, chosen[row].tolist())
        return tokens

    def _decode(self) -> list[Token]:
        """One step of the whole batch."""
        most = self._draft.length if self._draft is not None else 0
        drafts: list[list[int]] = [[] for _ in self._places]
        if most:
            for row, request in enumerate(self._places):
                if request is not None:  # of `left` tokens, one comes without a draft
                    drafts[row] = list(self._draft(request.tokens))[: min(most, request.left - 1)]
        if self._sampling is None or most:  # lengths on the device count rejected tokens
            self._set_table(self._places)
        if self._sampling is None:
            self._sampling = sampling_of(self._places)
        news = [
            [] if request is None else [request.tokens[-1], *draft]
            for request, draft in zip(self._places, drafts, strict=True)
        ]
        width = 1 + (most if any(drafts) else 0)
        chosen, seconds = self._run(
            self._places, news, width, self._sampling, prefill=False, prefix=True
        )
        tokens = []
        for row, (request, draft) in enumerate(zip(list(self._places), drafts, strict=True)):
            if request is None:
                continue
            accepted = 0
            while accepted < len(draft) and chosen[row, accepted] == draft[accepted]:
                accepted += 1
            self.stats.drafted_tokens += len(draft)
            self.stats.accepted_tokens += accepted
            self.scheduler.commit(request.seq, news[row][: 1 + accepted])
            tokens += self._take(request, chosen[row, : 1 + accepted].tolist())
        self.stats.decoded_tokens += len(tokens) if seconds else 0
        self.stats.decode_seconds += seconds
        return tokens

    def _set_table(self, batch: Sequence[Request | None]) -> None:
        """Makes these the batch that the cache is of."""
        seqs = [None if request is None else request.seq for request in batch]
        table = self.scheduler.block_table(seqs, self._max_blocks)
        cache = self.cache.with_table(table, self.scheduler.seqlens(seqs))
        self.cache = cache if self._device is None else jax.device_put(cache, self._device)

    def _run(
        self,
        batch: Sequence[Request | None],
        news: Sequence[Sequence[int]],
        width: int,
        sampling: tuple[jax.Array, ...],
        *,
        prefill: bool,
        prefix: bool,
    ) -> tuple[np.ndarray, float]:
        """A step; the tokens chosen [b, 1 or width], and its seconds: 0 where it was compiled."""
        start = time.perf_counter()
        tokens = np.zeros((len(batch), width), np.int32)
        for row, new in enumerate(news):
            tokens[row, : len(new)] = new
        num_new = np.zeros(len(batch), np.int32)
        num_new[: len(news)] = [len(new) for new in news]
        greedy = all(r is None or r.sampling.temperature == 0 for r in batch)
        options = {"prefill": prefill, "prefix": prefix, "greedy": greedy}
        self.cache, chosen = self._step(
            self._weights, self.cache, tokens, num_new, sampling, **options
        )
        chosen = np.asarray(chosen)  # waits for the device
        seconds = time.perf_counter() - start
        kind = (tokens.shape, *options.values())
        if kind in self._compiled:
            return chosen, seconds
        self._compiled.add(kind)
        self.stats.compile_seconds += seconds
        return chosen, 0.0

    def _take(self, request: Request, chosen: list[int]) -> list[Token]:
        """Gives a request its tokens up to one that ends it, and frees it then."""
        tokens = []
        for token in chosen:
            request.tokens.append(token)
            reason = self._reason(request)
            tokens.append(Token(request.number, token, reason))
            if reason is not None:
                self.stats.finished += 1
                self._end(request)
                break
        return tokens

    def _reason(self, request: Request) -> str | None:
        if request.tokens[-1] in request.stop_tokens:
            return "stop"
        if request.stop_strings and self._detokenize is not None:
            text = self._detokenize(request.tokens[request.prompt_length :])
            if any(string in text for string in request.stop_strings):
                return "stop"
        return "length" if request.left == 0 else None

    def _end(self, request: Request) -> None:
        self.scheduler.free(request.seq)
        self._places[request.place] = None
        self._sampling = None


@functools.lru_cache(maxsize=8)
def _jitted(step: Any, logits: Any, structure: jax.tree_util.PyTreeDef) -> Any:
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


def _power_of_two(n: int) -> int:
    """The least one that is at least n."""
    return 1 << (n - 1).bit_length()
