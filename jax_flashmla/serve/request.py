"""What goes into a server and what comes out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import jax

from jax_flashmla.serve.sampling import Sampling, sampling_arrays


class Token(NamedTuple):
    """A new token of a request; `reason` is None until its last: "stop" or "length"."""

    request: int
    id: int
    reason: str | None

    @property
    def last(self) -> bool:
        return self.reason is not None


@dataclasses.dataclass
class Stats:
    """Tokens and seconds; the first run of a step with a new shape, which compiles it, is apart."""

    prompt_tokens: int = 0  # that were computed
    cached_tokens: int = 0  # of prompts, that were found in the cache
    prefill_seconds: float = 0.0
    decoded_tokens: int = 0
    decode_seconds: float = 0.0
    compile_seconds: float = 0.0
    most_active: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0  # of those drafted
    finished: int = 0
    cancelled: int = 0


@dataclasses.dataclass
class Request:
    """A request and how far it has come."""

    number: int
    tokens: list[int]  # prompt, then generated
    prompt_length: int
    max_new_tokens: int
    sampling: Sampling
    stop_tokens: frozenset[int]
    stop_strings: tuple[str, ...]
    propose: Callable[[], Sequence[int]]  # a draft of what follows its tokens
    seq: Hashable = None  # its id in the scheduler, once it has a place
    place: int = -1  # in the batch

    @property
    def left(self) -> int:
        """Tokens that it may still get."""
        return self.max_new_tokens - (len(self.tokens) - self.prompt_length)


def sampling_of(batch: Sequence[Request | None]) -> tuple[jax.Array, ...]:
    """A batch's sampling as `sample` takes it; empty places are greedy."""
    return sampling_arrays([None if request is None else request.sampling for request in batch])
