"""Packed queries as a batch: windows of a few neighbouring tokens of one sequence.

Kernels compute tiles of up to 64 query rows (query token x head). A window has as many tokens as
fill one, so that its tokens read the cache together; to an operation it is a sequence of its own
that shares its table's row with its neighbours. Nothing is cut by max_q_len: a chunk of many tokens
and many sequences of one are balanced alike.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jax_flashmla import _limits


class Windows(NamedTuple):
    """n windows of s_q tokens over T packed ones. A window's last query is a sequence's token; one
    with fewer than s_q tokens has queries of somebody else before them, whose results are dropped.

    Where s_q is 1, window i is token i, and `queries` and `rows` are None.
    """

    sequence: jax.Array  # [n] within [0, b)
    cache_seqlens: jax.Array  # [n] what the window's last query sees; 0 in a window of nobody
    queries: jax.Array | None  # [n, s_q] packed tokens
    rows: jax.Array | None  # [T] each token's place in [n * s_q]; -1 in padding

    def unpack(self, q: jax.Array) -> jax.Array:
        """[T, ...] as [n, s_q, ...]."""
        return q[:, None] if self.queries is None else q[self.queries]

    def pack(self, x: jax.Array, padding: float) -> jax.Array:
        """[n, s_q, ...] as [T, ...], with `padding` where a token is nobody's."""
        if self.rows is None:
            return x[:, 0]
        packed = x.reshape(-1, *x.shape[2:])[jnp.maximum(self.rows, 0)]
        keep = (self.rows >= 0).reshape(-1, *(1,) * (x.ndim - 2))
        return jnp.where(keep, packed, jnp.asarray(padding, x.dtype))


def window_tokens(h_q: int, h_kv: int, max_q_len: int) -> int:
    """s_q of windows: as many tokens as share a tile. With several KV heads a tile has one's."""
    return 1 if h_kv > 1 else max(1, min(_limits.TILE_ROWS // h_q, max_q_len))


def num_windows(b: int, num_tokens: int, s_q: int, max_q_len: int) -> int:
    """The most windows that b sequences of num_tokens together can have."""
    if s_q == 1:
        return num_tokens
    return min(num_tokens, (num_tokens + b * (s_q - 1)) // s_q, b * -(-max_q_len // s_q))


class Tokens(NamedTuple):
    """Whose each packed token is."""

    sequence: jax.Array  # [T] within [0, b)
    number: jax.Array  # [T] of the token among its sequence's, from 0
    owned: jax.Array  # [T] bool, False in padding
    starts: jax.Array  # [b] each sequence's first token
    counts: jax.Array  # [b] and how many there are


def find_tokens(cu_q_lens: jax.Array, num_tokens: int) -> Tokens:
    """Owners of num_tokens packed tokens; what of cu_q_lens decreases or leaves them is clamped."""
    bounds = jax.lax.cummax(jnp.clip(cu_q_lens, 0, num_tokens))
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    sequence = _count_at_most(bounds[1:], token)
    b = bounds.shape[0] - 1
    owned = (token >= bounds[0]) & (sequence < b)
    sequence = jnp.minimum(sequence, b - 1)
    starts = bounds[:-1]
    return Tokens(sequence, token - starts[sequence], owned, starts, bounds[1:] - starts)


@functools.partial(
    jax.jit, inline=True, static_argnames=("num_tokens", "s_q", "max_q_len", "capacity", "causal")
)
def make_windows(
    cu_q_lens: jax.Array,
    cache_seqlens: jax.Array,
    *,
    num_tokens: int,
    s_q: int,
    max_q_len: int,
    capacity: int,
    causal: bool,
) -> Windows:
    """The windows of num_tokens packed tokens; those past a sequence's first max_q_len are padding.

    capacity: tokens that a sequence's blocks hold, to which lengths are clamped.
    """
    tokens = find_tokens(cu_q_lens, num_tokens)
    lengths = jnp.clip(cache_seqlens, 0, capacity)
    owned = tokens.owned & (tokens.number < max_q_len)

    def seen(sequence: jax.Array, end: jax.Array, owned: jax.Array) -> jax.Array:
        """Of queries that are the last before token `end` of their sequences."""
        after = tokens.counts[sequence] - end if causal else 0
        return jnp.where(owned, jnp.maximum(lengths[sequence] - after, 0), 0)

    if s_q == 1:
        seqlens = seen(tokens.sequence, tokens.number + 1, owned)
        return Windows(tokens.sequence, seqlens, None, None)

    counts = jnp.minimum(tokens.counts, max_q_len)
    per_sequence = -(-counts // s_q)
    ends = jnp.cumsum(per_sequence, dtype=jnp.int32)
    b = counts.shape[0]
    window = jnp.arange(num_windows(b, num_tokens, s_q, max_q_len), dtype=jnp.int32)
    sequence = _count_at_most(ends, window)
    used = sequence < b
    sequence = jnp.minimum(sequence, b - 1)
    before = window - (ends - per_sequence)[sequence]  # windows of the sequence before this one
    end = jnp.minimum((before + 1) * s_q, counts[sequence])
    first = tokens.starts[sequence] + end - s_q
    queries = first[:, None] + jnp.arange(s_q, dtype=jnp.int32)[None, :]

    before = tokens.number // s_q
    last = jnp.minimum((before + 1) * s_q, counts[tokens.sequence])
    row = ((ends - per_sequence)[tokens.sequence] + before + 1) * s_q - (last - tokens.number)
    return Windows(
        sequence,
        seen(sequence, end, used),
        jnp.clip(queries, 0, num_tokens - 1),
        jnp.where(owned, row, -1),
    )


def _count_at_most(bounds: jax.Array, x: jax.Array) -> jax.Array:
    """How many of the ascending bounds are at most x, for each x."""
    # Unrolled: one fused computation instead of a loop of launches.
    return jnp.searchsorted(bounds, x, side="right", method="scan_unrolled").astype(jnp.int32)
