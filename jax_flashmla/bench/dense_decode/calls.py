"""Builds the caches of a shape and the jitted functions that attend to them; checks a result."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_flashmla
from jax_flashmla import CacheFormat
from jax_flashmla.bench.attention_error import attention_error, heads_at
from jax_flashmla.bench.dense_decode.shapes import D_QK, D_V, ITEMSIZE, Shape
from jax_flashmla.bench.device import DECODE_TARGET
from jax_flashmla.bench.noise import normal
from jax_flashmla.bench.operation import Calls, Timed
from jax_flashmla.bench.pools import Pool
from jax_flashmla.bench.setup import Setup
from jax_flashmla.reference.rows import load_rows

MAX_RELATIVE_ERROR = 1e-2  # of one output row in the 2-norm; bf16 rounding of P and out gives 2e-3

TARGET = DECODE_TARGET
BASELINE_CALLS = 8  # separate caches for the baselines: fewer, because XLA compiles every call
PARTS = 132  # of a schedule on an H100 or H200: what its workspace is sized by


def memory(shape: Shape, setup: Setup) -> int:
    """Bytes of device memory: caches, q, the baselines' outs, accumulators."""
    cache = _pool_blocks(shape, setup) * format_of(shape, setup).block_bytes
    q_and_outs = shape.b * shape.s_q * shape.h_q * ITEMSIZE * (D_QK + BASELINE_CALLS * D_V)
    accumulators = 2 * PARTS * shape.s_q * shape.h_q * 4 * (D_V + 1)
    return cache + q_and_outs + accumulators


def _pool_blocks(shape: Shape, setup: Setup) -> int:
    """Blocks of all the shape's caches."""
    return setup.caches(shape) * shape.num_blocks(setup.block_size)


def make_pool(shapes: list[Shape], setup: Setup) -> Pool:
    """Random blocks of each format for the shape that needs most."""
    most: dict[CacheFormat, int] = {}
    for shape in shapes:
        format = format_of(shape, setup)
        most[format] = max(most.get(format, 1), _pool_blocks(shape, setup))
    return Pool(most, setup.device)


def format_of(shape: Shape, setup: Setup) -> CacheFormat:
    return CacheFormat(name=shape.format, block_size=setup.block_size, dtype=setup.dtype)


def make_tables(shape: Shape, caches: int, block_size: int) -> list[np.ndarray]:
    """One block table int32[b, max_blocks] per cache.

    Cache n is the n-th run of shape.num_blocks() blocks of the pool, in random order.
    """
    num_blocks, blocks_of = shape.num_blocks(block_size), -(-shape.seqlens() // block_size)
    used = np.arange(blocks_of.max()) < blocks_of[:, None]
    generator = np.random.default_rng(2)
    tables = []
    for cache in range(caches):
        table = np.zeros(used.shape, np.int32)
        table[used] = cache * num_blocks + generator.permutation(num_blocks)
        tables.append(table)
    return tables


def make_q(shape: Shape, dtype: Any, device: jax.Device) -> jax.Array:
    """Random queries [b, s_q, h_q, D_QK]."""
    return normal((shape.b, shape.s_q, shape.h_q, D_QK), dtype, device)


# (q, pool, tables, cache_seqlens) -> the last table's out, and something of each table's result
Decode = Callable[..., tuple[jax.Array, Any]]


@partial(jax.jit, static_argnums=(0, 2))
def make_schedule(
    shape: Shape, cache_seqlens: jax.Array, max_seqlen: int
) -> jax_flashmla.SplitSchedule:
    """The shape's schedule, under block tables with room for max_seqlen tokens."""
    return jax_flashmla.make_schedule(
        cache_seqlens, h_q=shape.h_q, s_q=shape.s_q, max_seqlen=max_seqlen
    )


def package_decode(
    shape: Shape,
    implementation: str,
    schedule: jax_flashmla.SplitSchedule | None = None,
    format: CacheFormat | None = None,
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
            block_size = pool.shape[1] if format is None else format.block_size
            schedule = make_schedule(shape, cache_seqlens, tables[0].shape[1] * block_size)
        attend = partial(
            jax_flashmla.dense_decode,
            causal=True,
            format=format,
            schedule=schedule,
            implementation=implementation,
        )
        outs, lses = zip(*(attend(q, pool, table, cache_seqlens) for table in tables), strict=True)
        return outs[-1], sum(lse[0, 0, 0] for lse in lses) if implementation == "kernel" else outs

    return decode if schedule is None else partial(decode, schedule=schedule)


def composed_decode(format: CacheFormat) -> Decode:
    """As package_decode, but what a JAX user writes without it: gather, dequantise, two einsums."""

    def attend(
        q: jax.Array, pool: jax.Array, table: jax.Array, cache_seqlens: jax.Array
    ) -> jax.Array:
        b, s_q = q.shape[:2]
        keys = rows_of(format, pool[table]).reshape(b, -1, D_QK)
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


def rows_of(format: CacheFormat, blocks: jax.Array) -> jax.Array:
    """Blocks [..., *format.block_shape] as rows [..., block_size, 1, D_QK] in format.dtype."""
    return load_rows(format, blocks, jnp.float32(1)).astype(format.dtype)


def make_calls(shape: Shape, pool: Pool, setup: Setup, *, with_xla: bool) -> Calls:
    """The kernels' calls and, with_xla, plain XLA's; on a CPU also the pure-JAX reference's."""
    caches, calls = setup.caches(shape), setup.calls(shape)
    # Arrays of their own, of which XLA cannot know that some are the same.
    tables = make_tables(shape, caches, setup.block_size) * (calls // caches)
    format = format_of(shape, setup)
    blocks = pool.blocks(format)
    q = make_q(shape, setup.dtype, setup.device)
    seqlens, device_tables = jax.device_put((shape.seqlens(), tables), setup.device)
    # The peers' schedules were made beforehand. A stack of layers makes its own, once.
    schedule = None
    if not setup.look_inside:
        schedule = make_schedule(shape, seqlens, tables[0].shape[1] * setup.block_size)
    decode = package_decode(shape, "kernel", schedule, format)

    baselines = {}
    if with_xla:
        few = (q, blocks, device_tables[:BASELINE_CALLS], seqlens)
        baselines["xla"] = Timed(composed_decode(format), few, len(few[2]))
        if setup.device.platform == "cpu":
            reference = package_decode(shape, "xla", format=format)
            baselines["reference"] = Timed(reference, few, len(few[2]))
    return Calls(
        Timed(decode, (q, blocks, device_tables, seqlens), calls),
        lambda result: relative_error(result[0], q, format, blocks, tables[-1], shape),
        baselines,
    )


def relative_error(
    out: jax.Array,
    q: jax.Array,
    format: CacheFormat,
    pool: jax.Array,
    table: np.ndarray,
    shape: Shape,
) -> float:
    """The worst head's error, of the longest sequence's last query, against naive attention."""
    sequence = int(shape.seqlens().argmax())
    tokens = int(shape.seqlens()[sequence])
    ids = table[sequence, : -(-tokens // format.block_size)]
    rows = np.asarray(_rows_at(format, pool, ids)).reshape(-1, D_QK)[:tokens]
    got, asked = (heads_at(array, sequence, -1) for array in (out, q))
    return attention_error(got, asked, rows, d_v=D_V, sm_scale=D_QK**-0.5)


@partial(jax.jit, static_argnums=0)
def _rows_at(format: CacheFormat, pool: jax.Array, ids: jax.Array) -> jax.Array:
    return rows_of(format, pool[ids])
