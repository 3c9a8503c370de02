"""index_scores and index_topk in pure JAX.

Query tokens and tokens of the cache are taken so many at a time that products with all heads stay
below a fixed size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Float32, Int32, UInt8

_BLOCK_SIZE = 64  # tokens
_COLUMNS = 128
_CHUNK_FLOATS = 2**26  # of one array


class Keys(NamedTuple):
    """Cached keys of a layer: blocks of 64 x 128 e4m3 codes, then 64 f32 scales."""

    blocks: UInt8[Array, "num_blocks 8448"]
    block_table: Int32[Array, "b max_blocks"]
    cache_seqlens: Int32[Array, "b"]
    first_block: Int32[Array, ""]
    layer_blocks: int


def index_scores(
    q: Float[Array, "b s_q heads 128"],
    weights: Float32[Array, "b s_q heads"],
    keys: Keys,
    *,
    causal: bool,
) -> Float32[Array, "b s_q tokens"]:
    """Scores of all tokens, -inf where not visible."""
    return _map_queries(lambda scores: scores, q, weights, keys, causal)


def index_topk(
    q: Float[Array, "b s_q heads 128"],
    weights: Float32[Array, "b s_q heads"],
    keys: Keys,
    *,
    topk: int,
    causal: bool,
) -> Int32[Array, "b s_q {topk}"]:
    """Positions of the highest scores, ascending, then -1."""

    def finish(scores: Array) -> Array:
        # The barrier keeps the scores' bits those of index_scores.
        return _select_rows(jax.lax.optimization_barrier(scores), topk)

    return _map_queries(finish, q, weights, keys, causal)


def select_topk(
    scores: Float32[Array, "b s_q tokens"],
    block_table: Int32[Array, "b max_blocks"],
    cache_seqlens: Int32[Array, "b"],
    *,
    topk: int,
    layer_blocks: int,
    causal: bool,
) -> Int32[Array, "b s_q {topk}"]:
    """index_topk of scores that are given."""
    b, s_q, tokens = scores.shape
    in_layer = jnp.repeat(_in_layer(block_table, layer_blocks), _BLOCK_SIZE, axis=1)
    visible = _visible_tokens(cache_seqlens, tokens, s_q, causal)

    def select(inputs: tuple[Array, Array, Array]) -> Array:
        row, seen, mask = inputs
        keep = (jnp.arange(tokens, dtype=jnp.int32) < seen) & in_layer[mask]
        return _select_rows(jnp.where(keep, row, -jnp.inf)[None], topk)[0]

    sequence = jnp.repeat(jnp.arange(b, dtype=jnp.int32), s_q)
    inputs = (scores.reshape(b * s_q, tokens), visible.reshape(-1), sequence)
    return _map(select, inputs, tokens).reshape(b, s_q, topk)


def slots_of(
    positions: Int32[Array, "b s_q topk"], block_table: Int32[Array, "b max_blocks"]
) -> Int32[Array, "b s_q topk"]:
    """Slots of token positions; -1 stays."""
    b, s_q, topk = positions.shape
    entry = jnp.maximum(positions, 0) // _BLOCK_SIZE
    block = jnp.take_along_axis(block_table, entry.reshape(b, -1), axis=1).reshape(b, s_q, topk)
    return jnp.where(positions < 0, -1, block * _BLOCK_SIZE + positions % _BLOCK_SIZE)


def _map_queries(
    finish: Callable[[Array], Array],
    q: Float[Array, "b s_q heads 128"],
    weights: Float32[Array, "b s_q heads"],
    keys: Keys,
    causal: bool,
) -> Array:
    """finish(scores [group, tokens]) of groups of query tokens, [b, s_q, ...]."""
    b, s_q, heads, _ = q.shape
    max_blocks = keys.block_table.shape[1]
    tokens = max_blocks * _BLOCK_SIZE
    group = min(s_q, max(1, _CHUNK_FLOATS // max(tokens, heads * _BLOCK_SIZE)))
    width = min(max_blocks, max(1, _CHUNK_FLOATS // (group * heads * _BLOCK_SIZE)))

    groups = -(-s_q // group)
    visible = _visible_tokens(keys.cache_seqlens, tokens, s_q, causal)
    split = [
        jnp.pad(x, [(0, 0), (0, groups * group - s_q), *((0, 0),) * (x.ndim - 2)]).reshape(
            b * groups, group, *x.shape[2:]
        )
        for x in (q, weights, visible)
    ]
    tables = jnp.repeat(keys.block_table, groups, axis=0)

    def one(inputs: tuple[Array, Array, Array, Array]) -> Array:
        return finish(_group_scores(*inputs, keys, width))

    floats = group * max(tokens, heads * _BLOCK_SIZE * width)
    mapped = _map(one, (*split, tables), floats)
    return mapped.reshape(b, groups * group, *mapped.shape[2:])[:, :s_q]


def _map(one: Callable, inputs: tuple[Array, ...], floats: int) -> Array:
    """vmap where that makes no arrays of more than a chunk's floats, `floats` an index."""
    at_a_time = max(1, _CHUNK_FLOATS // floats)
    if inputs[0].shape[0] <= at_a_time:
        return jax.vmap(one)(inputs)
    return jax.lax.map(one, inputs, batch_size=at_a_time)


def _group_scores(
    q: Float[Array, "group heads 128"],
    weights: Float32[Array, "group heads"],
    visible: Int32[Array, "group"],
    ids: Int32[Array, "max_blocks"],
    keys: Keys,
    width: int,
) -> Float32[Array, "group tokens"]:
    """Of one sequence, whose blocks are taken `width` at a time."""
    max_blocks = ids.shape[0]
    chunks = -(-max_blocks // width)
    ids = jnp.pad(ids, (0, chunks * width - max_blocks), constant_values=-1)
    first = jnp.arange(chunks, dtype=jnp.int32) * (width * _BLOCK_SIZE)

    def one(inputs: tuple[Array, Array]) -> Array:
        return _chunk_scores(q, weights, visible - inputs[1], inputs[0], keys)

    inputs = (ids.reshape(chunks, width), first)
    scores = one((ids, first[0])) if chunks == 1 else jax.lax.map(one, inputs)
    scores = scores.reshape(chunks, q.shape[0], -1).swapaxes(0, 1).reshape(q.shape[0], -1)
    return scores[:, : max_blocks * _BLOCK_SIZE]


def _chunk_scores(
    q: Float[Array, "group heads 128"],
    weights: Float32[Array, "group heads"],
    visible: Int32[Array, "group"],
    ids: Int32[Array, "width"],
    keys: Keys,
) -> Float32[Array, "group tokens"]:
    token = jnp.arange(ids.shape[0] * _BLOCK_SIZE, dtype=jnp.int32)
    in_layer = _in_layer(ids, keys.layer_blocks)
    last = keys.blocks.shape[0] - keys.layer_blocks
    first = jnp.clip(keys.first_block, 0, last)
    stored = keys.blocks[first + jnp.where(in_layer, ids, 0)]
    codes = stored[:, : _BLOCK_SIZE * _COLUMNS].reshape(-1, _COLUMNS)
    scale_bytes = stored[:, _BLOCK_SIZE * _COLUMNS :].reshape(-1, 4)
    scales = jax.lax.bitcast_convert_type(scale_bytes, jnp.float32)
    in_layer = jnp.repeat(in_layer, _BLOCK_SIZE)
    seen = in_layer & (token < jnp.max(visible))  # by any query token: others may be poison
    codes = jnp.where(seen[:, None], codes, jnp.uint8(0))
    scales = jnp.where(seen, scales, 0.0)
    values = jax.lax.bitcast_convert_type(codes, jnp.float8_e4m3fn).astype(jnp.float32)
    products = jnp.einsum(
        "nhd,td->nht",
        q.astype(jnp.float32),
        values,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    positive = jnp.where(products < 0, 0.0, products)  # unlike jnp.maximum's, a NaN stays on CPUs
    scores = jnp.sum(weights[:, :, None] * positive, axis=1) * scales[None, :]
    keep = in_layer[None, :] & (token[None, :] < visible[:, None])
    return jnp.where(keep, scores, -jnp.inf)


def _in_layer(ids: Int32[Array, "*n"], layer_blocks: int) -> Bool[Array, "*n"]:
    return (ids >= 0) & (ids < layer_blocks)


def _visible_tokens(
    cache_seqlens: Int32[Array, "b"], tokens: int, s_q: int, causal: bool
) -> Int32[Array, "b {s_q}"]:
    """How many tokens each query token sees, of those that the table has room for."""
    seqlens = jnp.clip(cache_seqlens, 0, tokens)
    query = jnp.arange(s_q, dtype=jnp.int32)
    hidden = s_q - 1 - query if causal else jnp.zeros_like(query)
    return jnp.maximum(seqlens[:, None] - hidden[None, :], 0)


def _select_rows(scores: Float32[Array, "n tokens"], topk: int) -> Int32[Array, "n {topk}"]:
    """Positions of each row's highest scores, ascending, then -1; of equal ones the earliest."""
    n, tokens = scores.shape
    # In integers: comparisons of floats may take denormals for 0.
    bits = jax.lax.bitcast_convert_type(scores, jnp.uint32)
    magnitude = bits & jnp.uint32(0x7FFFFFFF)
    scores = jnp.where(magnitude == 0, 0.0, scores)  # -0.0 is 0.0
    scores = jnp.where(magnitude > 0x7F800000, -jnp.inf, scores)
    highest, positions = jax.lax.top_k(scores, min(topk, tokens))
    positions = jnp.sort(jnp.where(highest > -jnp.inf, positions, tokens), axis=1)
    positions = jnp.pad(positions, ((0, 0), (0, topk - positions.shape[1])), constant_values=tokens)
    return jnp.where(positions < tokens, positions, -1)
