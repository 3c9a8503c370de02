"""A shape's keys, tables, queries or given scores, and what its scores are."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_flashmla import CacheFormat
from jax_flashmla.bench.gather import take
from jax_flashmla.bench.indexer.shapes import BLOCK_SIZE, COLUMNS, KEY_BYTES, ScoresShape
from jax_flashmla.bench.noise import normal
from jax_flashmla.bench.pools import Pool
from jax_flashmla.bench.setup import Setup

FORMAT = CacheFormat(name="fp8_index")


class Inputs(NamedTuple):
    """Of one function: a table for each call. Where scores are given, they are the call's too."""

    q: jax.Array  # [b, s_q, heads, 128] e4m3
    weights: jax.Array  # [b, s_q, heads]
    blocks: jax.Array
    cache_seqlens: jax.Array
    tables: list[jax.Array]
    scores: list[jax.Array]


def blocks_of(shape: ScoresShape) -> int:
    """Of a sequence's table."""
    return -(-shape.s_k // BLOCK_SIZE)


def pool_blocks(shape: ScoresShape, setup: Setup) -> int:
    """Blocks of all the shape's caches."""
    return setup.caches(shape) * shape.b * blocks_of(shape)


def make_pool(shapes: list[ScoresShape], setup: Setup) -> Pool:
    """Random keys for the shape that needs most; those of given scores read none."""
    most = max((pool_blocks(s, setup) for s in shapes if s.heads > 0), default=1)
    return Pool({FORMAT: most}, setup.device)


def memory(shape: ScoresShape, setup: Setup) -> int:
    """Bytes of device memory: keys, or given scores, and those that all calls make."""
    given = setup.caches(shape) if shape.heads == 0 else 0
    keys = 0 if given else pool_blocks(shape, setup) * FORMAT.block_bytes
    rows = shape.b * shape.s_q
    scores = 4 * rows * blocks_of(shape) * BLOCK_SIZE
    queries = rows * shape.heads * (COLUMNS + 4)
    return keys + queries + (given + 2) * scores


def abstract_inputs(shape: ScoresShape, pool: Pool, calls: int) -> Inputs:
    """What `make_inputs` returns, for so many calls, without the arrays."""
    rows, blocks = (shape.b, shape.s_q, shape.heads), blocks_of(shape)
    made: Any = jax.ShapeDtypeStruct
    keys: Any = pool.abstract(FORMAT)
    scores = made((*rows[:2], blocks * BLOCK_SIZE), jnp.float32)
    return Inputs(
        q=made((*rows, COLUMNS), jnp.float8_e4m3fn),
        weights=made(rows, jnp.float32),
        blocks=keys,
        cache_seqlens=made((shape.b,), jnp.int32),
        tables=[made((shape.b, blocks), jnp.int32)] * calls,
        scores=[scores] * calls if shape.heads == 0 else [],
    )


def make_inputs(shape: ScoresShape, pool: Pool, setup: Setup) -> Inputs:
    """Blocks of a cache are at random places within a run of the pool of its own."""
    caches, calls = setup.caches(shape), setup.calls(shape)
    run = shape.b * blocks_of(shape)
    generator = np.random.default_rng(2)
    tables = [
        (cache * run + generator.permutation(run)).reshape(shape.b, -1).astype(np.int32)
        for cache in range(caches)
    ]
    rounds = calls // caches
    device, rows = setup.device, (shape.b, shape.s_q, shape.heads)
    scores = []
    if shape.heads == 0:
        ends = (*rows[:2], blocks_of(shape) * BLOCK_SIZE)
        scores = [normal(ends, jnp.float32, device, seed) for seed in range(caches)]
    return Inputs(
        q=normal((*rows, COLUMNS), jnp.float8_e4m3fn, device),
        weights=normal(rows, jnp.float32, device, seed=1),
        blocks=pool.blocks(FORMAT),
        cache_seqlens=jax.device_put(np.full(shape.b, shape.s_k, np.int32), device),
        # Arrays of their own, of which XLA cannot know that some are the same.
        tables=jax.device_put(tables * rounds, device),
        scores=scores * rounds,
    )


def compose_scores(
    q: jax.Array, weights: jax.Array, blocks: jax.Array, table: jax.Array, seqlens: jax.Array
) -> jax.Array:
    """What a JAX user writes: gather, two products, mask. [b, s_q, tokens]."""
    keys = blocks[table]
    codes = jax.lax.bitcast_convert_type(
        keys[..., : BLOCK_SIZE * COLUMNS].reshape(len(q), -1, COLUMNS), jnp.float8_e4m3fn
    )
    scales = jax.lax.bitcast_convert_type(
        keys[..., BLOCK_SIZE * COLUMNS : BLOCK_SIZE * KEY_BYTES].reshape(len(q), -1, 4), jnp.float32
    )
    products = jnp.einsum(
        "bqhd,btd->bqht",
        q.astype(jnp.bfloat16),
        codes.astype(jnp.bfloat16),
        preferred_element_type=jnp.float32,
    )
    scores = jnp.einsum("bqht,bqh->bqt", jax.nn.relu(products), weights) * scales[:, None]
    s_q = scores.shape[1]
    seen = seqlens[:, None] - (s_q - 1 - jnp.arange(s_q))[None]
    token = jnp.arange(scores.shape[2])[None, None]
    return jnp.where(token < seen[..., None], scores, -jnp.inf)


def last_scores(shape: ScoresShape, inputs: Inputs) -> np.ndarray:
    """Of the last query token of the last call, [s_k], in float64."""
    if shape.heads == 0:
        return np.asarray(inputs.scores[-1])[-1, -1, : shape.s_k].astype(np.float64)
    keys = np.asarray(take(inputs.blocks, np.asarray(inputs.tables[-1])[-1]))
    codes = keys[:, : BLOCK_SIZE * COLUMNS].reshape(-1, COLUMNS).view(jnp.float8_e4m3fn)
    scales = np.ascontiguousarray(keys[:, BLOCK_SIZE * COLUMNS :]).view(np.float32).reshape(-1)
    q = np.asarray(inputs.q)[-1, -1].astype(np.float64)
    products = np.maximum(codes.astype(np.float64) @ q.T, 0)
    scores = products @ np.asarray(inputs.weights)[-1, -1].astype(np.float64) * scales
    return scores[: shape.s_k]
