"""Continuous batching: requests take the places of those that have ended, in one paged cache."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jax_flashmla import BlockTable, CacheFormat, OutOfBlocks, PagedCache, Scheduler
from jax_flashmla.serve.checks import at_least, strings, token_ids
from jax_flashmla.serve.draft import follow
from jax_flashmla.serve.ends import reason_to_end
from jax_flashmla.serve.model import Model, jitted_step
from jax_flashmla.serve.request import Request, Stats, Token, sampling_of
from jax_flashmla.serve.sampling import Sampling

SHORTEST_PREFILL = 16  # tokens that prompts are padded to at least; then powers of two


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
            proposes, and maybe `follow(tokens)`, which returns what proposes for tokens that grow:
            see `NGramDraft`.
        detokenize: `detokenize(tokens) -> text`, for stop strings.
        device: a `jax.Device` or `jax.sharding.Sharding` for the cache, where the weights are
            not on JAX's default device.

    Raises:
        TypeError, ValueError: a number of another type or out of range, or what is no function.
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
        batch = at_least(1, "batch", batch)
        self.max_tokens = max_tokens = at_least(2, "max_tokens", max_tokens)
        self.stop_tokens = frozenset(token_ids("stop_tokens", stop_tokens))
        for name, function in (("draft", draft), ("detokenize", detokenize)):
            if function is not None and not callable(function):
                raise TypeError(f"{name} must be a function or None, got {function!r}")
        self._most_drafted = 0 if draft is None else at_least(1, "draft.length", draft.length)
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
        self._detokenize, self._device = detokenize, device
        self._follow = follow(draft)
        self._waiting: collections.deque[Request] = collections.deque()
        self._places: list[Request | None] = [None] * batch
        self._sampling: tuple[jax.Array, ...] | None = None  # of the places; None: they changed
        self._cancelled: set[int] = set()  # since the last step began
        self._next_number = 0
        # A list is faster to pass to a jitted function, at every step, than most pytrees are.
        self._weights, structure = jax.tree.flatten(model.weights)
        self._step = jitted_step(model.step, model.logits, structure)
        self._compiled: set[tuple] = set()

    @property
    def active(self) -> int:
        """Requests that have a place."""
        return sum(request is not None for request in self._places)

    @property
    def waiting(self) -> int:
        """Requests that wait for one."""
        return len(self._waiting)

    def check(self, prompt: Sequence[int], max_new_tokens: int, name: str = "prompt") -> list[int]:
        """The prompt's tokens, if `add` would take them: token ids, some, and with room for them.

        Raises:
            TypeError: `prompt` is not of integers, or `max_new_tokens` is no integer.
            ValueError: the prompt is empty or has a negative token, or there is too little room.
        """
        total = at_least(1, "max_new_tokens", max_new_tokens)
        if not len(prompt := token_ids(name, prompt)):
            raise ValueError(f"{name} must have at least one token, got none")
        total += len(prompt)
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
        return prompt

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
            TypeError: see `check`; or `sampling` or `stop_tokens` of another type.
            ValueError: see `check`; or what is no stop string, or one without `detokenize`.
        """
        prompt = self.check(prompt, max_new_tokens)
        stops = self.stop_tokens | frozenset(token_ids("stop_tokens", stop_tokens))
        stop_strings = strings("stop_strings", stop_strings)
        if stop_strings and self._detokenize is None:
            raise ValueError("stop_strings need a server with detokenize, got one without")
        if not isinstance(sampling, Sampling | None):
            raise TypeError(f"sampling must be a Sampling or None, got {sampling!r}")
        number, self._next_number = self._next_number, self._next_number + 1
        self._waiting.append(
            Request(
                number,
                prompt,
                len(prompt),
                int(max_new_tokens),
                sampling or Sampling(),
                stops,
                stop_strings,
                self._follow(prompt),
            )
        )
        return number

    def cancel(self, number: int) -> bool:
        """Ends a request, waiting or active; False where it has ended already.

        `stream` yields none of its tokens from then on.
        """
        for request in [*self._waiting, *self._places]:
            if request is not None and request.number == number:
                self.stats.cancelled += 1
                self._cancelled.add(number)
                if request.place < 0:
                    self._waiting.remove(request)
                else:
                    self._leave(request)
                return True
        return False

    def step(self) -> list[Token]:
        """Prefills what can be admitted, or advances every sequence; the new tokens.

        Where the model, `draft` or `detokenize` raises, every request is as it was, and may be
        stepped again.
        """
        self._cancelled.clear()
        admitted = self._admit()
        try:
            if admitted:
                return self._prefill(admitted)
            return self._decode() if self.active else []
        except BaseException:
            self._sampling = None  # the device's lengths may have advanced
            for request in reversed(admitted):
                self._leave(request)
                self._waiting.appendleft(request)
            raise

    def stream(self) -> Iterator[Token]:
        """Yields every new token as it comes, until no request is left; more may be added."""
        while self._waiting or self.active:
            for token in self.step():
                if token.request not in self._cancelled:
                    yield token

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
        batch = [*admitted, *[None] * (_power_of_two(len(admitted)) - len(admitted))]
        width = max(_power_of_two(max(map(len, news))), SHORTEST_PREFILL)
        self._sampling = None
        self._set_table(batch)
        chosen, seconds = self._run(
            batch, news, width, sampling_of(batch), prefill=True, prefix=any(cached)
        )
        tokens = self._take(admitted, news, chosen[: len(admitted)].tolist())
        self.stats.cached_tokens += sum(cached)
        self.stats.prompt_tokens += sum(map(len, news)) if seconds else 0
        self.stats.prefill_seconds += seconds
        return tokens

    def _decode(self) -> list[Token]:
        """One step of the whole batch."""
        most = self._most_drafted
        drafts: list[list[int]] = [[] for _ in self._places]
        if most:
            for row, request in enumerate(self._places):
                if request is not None:  # of `left` tokens, one comes without a draft
                    drafts[row] = list(request.propose())[: min(most, request.left - 1)]
        if self._sampling is None:
            self._set_table(self._places)
            self._sampling = sampling_of(self._places)
        elif most:  # lengths on the device count rejected tokens
            self._set_lengths(self._places)
        news = [
            [] if request is None else [request.tokens[-1], *draft]
            for request, draft in zip(self._places, drafts, strict=True)
        ]
        width = 1 + (most if any(drafts) else 0)
        chosen, seconds = self._run(
            self._places, news, width, self._sampling, prefill=False, prefix=True
        )
        requests, kept, gains = [], [], []
        drafted = accepted = 0
        for row, (request, draft) in enumerate(zip(self._places, drafts, strict=True)):
            if request is None:
                continue
            right = 0
            while right < len(draft) and chosen[row, right] == draft[right]:
                right += 1
            drafted, accepted = drafted + len(draft), accepted + right
            requests.append(request)
            kept.append(news[row][: 1 + right])
            gains.append(chosen[row, : 1 + right].tolist())
        tokens = self._take(requests, kept, gains)
        self.stats.drafted_tokens += drafted
        self.stats.accepted_tokens += accepted
        self.stats.decoded_tokens += len(tokens) if seconds else 0
        self.stats.decode_seconds += seconds
        return tokens

    def _set_table(self, batch: Sequence[Request | None]) -> None:
        """Makes these the batch that the cache is of."""
        table = self.scheduler.block_table(_seqs_of(batch), self._max_blocks)
        self._set_lengths(batch, table)

    def _set_lengths(
        self, batch: Sequence[Request | None], table: np.ndarray | None = None
    ) -> None:
        """Makes the cache's lengths the batch's, and its table the one given."""
        ids = self.cache.table.block_table if table is None else table
        cache = self.cache.with_table(ids, self.scheduler.seqlens(_seqs_of(batch)))
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

    def _take(
        self,
        requests: Sequence[Request],
        computed: Sequence[Sequence[int]],
        chosen: Sequence[Sequence[int]],
    ) -> list[Token]:
        """Gives requests their tokens, each up to one that ends it, and frees those that end.

        Args:
            requests: those of a step.
            computed: the tokens of each whose rows the cache has got.
            chosen: the tokens of each that follow.
        """
        gains = [self._until_end(r, new) for r, new in zip(requests, chosen, strict=True)]
        for request, rows, gain in zip(requests, computed, gains, strict=True):
            self.scheduler.commit(request.seq, rows)
            request.tokens += [token.id for token in gain]
            if gain[-1].last:
                self.stats.finished += 1
                self._leave(request)
        return [token for gain in gains for token in gain]

    def _until_end(self, request: Request, chosen: Sequence[int]) -> list[Token]:
        """The first of the chosen tokens that ends a request, and those before it."""
        tokens: list[Token] = []
        for i, token in enumerate(chosen):
            reason = reason_to_end(request, chosen[: i + 1], self._detokenize)
            tokens.append(Token(request.number, token, reason))
            if tokens[-1].last:
                break
        return tokens

    def _leave(self, request: Request) -> None:
        """Takes a request's place and blocks away."""
        self.scheduler.free(request.seq)
        self._places[request.place] = None
        request.place, self._sampling = -1, None


def _seqs_of(batch: Sequence[Request | None]) -> list[Hashable | None]:
    """The scheduler's ids."""
    return [None if request is None else request.seq for request in batch]


def _power_of_two(n: int) -> int:
    """The least one that is at least n."""
    return 1 << (n - 1).bit_length()
