"""Builds the caches of a row and the jitted functions that attend to them, and checks a result."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_flashmla
from jax_flashmla.cli.bench.shapes import D_QK, D_V, Row

MAX_RELATIVE_ERROR = 1e-2  # of one output row in the 2-norm; bf16 rounding of P and out gives 2e-3

SLAB_TOKENS = 1 << 17


def make_pool(num_blocks: int, block_size: int, dtype: Any, device: jax.Device) -> jax.Array:
    """Random blocks [num_blocks, block_size, 1, D_QK], generated in place, a slab at a time."""
    slab = min(num_blocks, SLAB_TOKENS // block_size)

    @partial(jax.jit, donate_argnums=0)
    def fill(pool: jax.Array, start: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(1), start)
        values = jax.random.normal(key, (slab, block_size, 1, D_QK), dtype)
        return jax.lax.dynamic_update_slice(pool, values, (start, 0, 0, 0))

    with jax.default_device(device):
        pool = jnp.zeros((num_blocks, block_size, 1, D_QK), dtype)
        for start in range(0, num_blocks, slab):
            pool = fill(pool, jnp.int32(min(start, num_blocks - slab)))
    return pool


def make_tables(row: Row, caches: int, block_size: int) -> list[np.ndarray]:
    """One block table int32[b, max_blocks] per cache.

    Cache n is the n-th run of row.num_blocks() blocks of the pool, in random order.
    """
    num_blocks, blocks_of = row.num_blocks(block_size), -(-row.seqlens() // block_size)
    used = np.arange(blocks_of.max()) < blocks_of[:, None]
    generator = np.random.default_rng(2)
    tables = []
    for cache in range(caches):
        table = np.zeros(used.shape, np.int32)
        table[used] = cache * num_blocks + generator.permutation(num_blocks)
        tables.append(table)
    return tables


def make_q(row: Row, dtype: Any, device: jax.Device) -> jax.Array:
    """Random queries [b, s_q, h_q, D_QK]."""
    with jax.default_device(device):
        return jax.random.normal(jax.random.key(3), (row.b, row.s_q, row.h_q, D_QK), dtype)


# (q, pool, tables, cache_seqlens) -> the last table's out, and something of each table's result
Decode = Callable[..., tuple[jax.Array, Any]]


def make_schedule(
    row: Row, cache_seqlens: jax.Array, max_seqlen: int
) -> jax_flashmla.SplitSchedule:
    """The row's schedule, under block tables with room for max_seqlen tokens."""
    return jax_flashmla.make_schedule(
        cache_seqlens, h_q=row.h_q, s_q=row.s_q, max_seqlen=max_seqlen
    )


def package_decode(
    row: Row, implementation: str, schedule: jax_flashmla.SplitSchedule | None = None
) -> Decode:
    """One call per table, through jax_flashmla.

    Without a schedule the function makes one for all its calls, as a decoding step does. Of the
    kernels' calls it returns the sum of one lse each. So an out dies at once, as in a model, and
    all get the same memory: each in memory of its own, they would all be written to DRAM, 4 us more
    a call of 140 (b 128, 16 heads, 4k tokens, an H200). And the host has no 128 results to make:
    with them, dispatching a run took it 0.65 ms instead of 0.29.
    """

    @jax.jit
    def decode(
        q: jax.Array,
        pool: jax.Array,
        tables: list[jax.Array],
        cache_seqlens: jax.Array,
        schedule: jax_flashmla.SplitSchedule | None = None,
    ) -> tuple[jax.Array, Any]:
        if schedule is None:
            schedule = make_schedule(row, cache_seqlens, tables[0].shape[1] * pool.shape[1])
        attend = partial(
            jax_flashmla.dense_decode, causal=True, schedule=schedule, implementation=implementation
        )
        outs, lses = zip(*(attend(q, pool, table, cache_seqlens) for table in tables), strict=True)
        return outs[-1], sum(lse[0, 0, 0] for lse in lses) if implementation == "kernel" else outs

    return decode if schedule is None else partial(decode, schedule=schedule)


def composed_decode() -> Decode:
    """As package_decode, but what a JAX user writes without it: gather, einsum, softmax, einsum."""

    def attend(
        q: jax.Array, pool: jax.Array, table: jax.Array, cache_seqlens: jax.Array
    ) -> jax.Array:
        b, s_q = q.shape[:2]
        keys = pool[table].reshape(b, -1, D_QK)
        scores = jnp.einsum("bshd,bkd->bshk", q, keys, preferred_element_type=jnp.float32)
        end = cache_seqlens[:, None] - jnp.arange(s_q - 1, -1, -1)[None]
        visible = jnp.arange(keys.shape[1])[None, None] < end[..., None]
        p = jax.nn.softmax(jnp.where(visible[:, :, None], scores * D_QK**-0.5, -jnp.inf))
        return jnp.einsum("bshk,bkd->bshd", p.astype(q.dtype), keys[..., :D_V])

    @jax.jit
    def decode(
        q: jax.Array, pool: jax.Array, tables: list[jax.Array], cache_seqlens: jax.Array
    ) -> tuple[jax.Array, list[jax.Array]]:
        outs = [attend(q, pool, table, cache_seqlens) for table in tables]
        return outs[-1], outs

    return decode


def relative_error(
    out: jax.Array, q: jax.Array, pool: jax.Array, table: np.ndarray, row: Row
) -> float:
    """Error of the last query and head of the longest sequence against NumPy in float32."""
    sequence = int(row.seqlens().argmax())
    tokens = int(row.seqlens()[sequence])
    ids = table[sequence, : -(-tokens // pool.shape[1])]
    keys = np.asarray(pool[jnp.asarray(ids)]).astype(np.float32).reshape(-1, D_QK)[:tokens]
    scores = keys @ np.asarray(q)[sequence, -1, -1].astype(np.float32) * D_QK**-0.5
    weights = np.exp(scores - scores.max())
    expected = weights @ keys[:, :D_V] / weights.sum()
    got = np.asarray(out)[sequence, -1, -1].astype(np.float32)
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))
