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
from jax_flashmla.bench.ahead import Lowered, Programs
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


@partial(jax.jit, static_argnums=(0, 2, 3))
def make_schedule(
    shape: Shape, cache_seqlens: jax.Array, max_seqlen: int, format: CacheFormat
) -> jax_flashmla.SplitSchedule:
    """The shape's schedule, under block tables with room for max_seqlen tokens."""
    return jax_flashmla.make_schedule(
        cache_seqlens, h_q=shape.h_q, s_q=shape.s_q, max_seqlen=max_seqlen, format=format
    )


@partial(jax.jit, static_argnums=(0, 1, 2))
def package_decode(
    shape: Shape,
    implementation: str,
    format: CacheFormat,
    q: jax.Array,
    pool: jax.Array,
    tables: list[jax.Array],
    cache_seqlens: jax.Array,
    schedule: jax_flashmla.SplitSchedule | None = None,
) -> tuple[jax.Array, Any]:
    """One call per table, through jax_flashmla.

    Without a schedule the function makes one for all its calls, as a decoding step does. Of the
    kernels' calls it returns, beside the last out, the sum of one lse each. So an out dies at once,
    as in a model, and all get the same memory: each in memory of its own, they would all be written
    to DRAM, 4 us more a call of 140 (b 128, 16 heads, 4k tokens, an H200). And the host has no 128
    results to make: with them, dispatching a run took it 0.65 ms instead of 0.29.
    """
    if schedule is None:
        room = tables[0].shape[1] * format.block_size
        schedule = make_schedule(shape, cache_seqlens, room, format)
    attend = partial(
        jax_flashmla.dense_decode,
        causal=True,
        format=format,
        schedule=schedule,
        implementation=implementation,
    )
    outs, lses = zip(*(attend(q, pool, table, cache_seqlens) for table in tables), strict=True)
    return outs[-1], sum(lse[0, 0, 0] for lse in lses) if implementation == "kernel" else outs


@partial(jax.jit, static_argnums=0)
def composed_decode(
    format: CacheFormat,
    q: jax.Array,
    pool: jax.Array,
    tables: list[jax.Array],
    cache_seqlens: jax.Array,
) -> tuple[jax.Array, list[jax.Array]]:
    """As package_decode, but what a JAX user writes without it: gather, dequantise, two einsums."""

    def attend(table: jax.Array) -> jax.Array:
        b, s_q = q.shape[:2]
        keys = rows_of(format, pool[table]).reshape(b, -1, D_QK)
        scores = jnp.einsum("bshd,bkd->bshk", q, keys, preferred_element_type=jnp.float32)
        end = cache_seqlens[:, None] - jnp.arange(s_q - 1, -1, -1)[None]
        visible = jnp.arange(keys.shape[1])[None, None] < end[..., None]
        p = jax.nn.softmax(jnp.where(visible[:, :, None], scores * D_QK**-0.5, -jnp.inf))
        return jnp.einsum("bshk,bkd->bshd", p.astype(q.dtype), keys[..., :D_V])

    outs = [attend(table) for table in tables]
    return outs[-1], outs


def rows_of(format: CacheFormat, blocks: jax.Array) -> jax.Array:
    """Blocks [..., *format.block_shape] as rows [..., block_size, 1, D_QK] in format.dtype."""
    return load_rows(format, blocks, jnp.float32(1)).astype(format.dtype)


def _longest(shape: Shape, block_size: int) -> tuple[int, int, int]:
    """The longest sequence, its tokens, and the blocks that they take."""
    sequence = int(shape.seqlens().argmax())
    tokens = int(shape.seqlens()[sequence])
    return sequence, tokens, -(-tokens // block_size)


def programs(shape: Shape, pool: Pool, setup: Setup, *, with_xla: bool) -> Lowered:
    """The schedule, the kernels' calls, the rows of a check; with_xla plain XLA's calls, and on a
    CPU the pure-JAX reference's."""
    format, blocks = format_of(shape, setup), pool.abstract(format_of(shape, setup))
    _, _, columns = _longest(shape, setup.block_size)
    q = jax.ShapeDtypeStruct((shape.b, shape.s_q, shape.h_q, D_QK), setup.dtype)
    ids = jax.ShapeDtypeStruct((columns,), jnp.int32)
    table = jax.ShapeDtypeStruct((shape.b, columns), jnp.int32)
    lengths = jax.ShapeDtypeStruct((shape.b,), jnp.int32)
    few = (q, blocks, [table] * min(BASELINE_CALLS, setup.calls(shape)), lengths)
    found, schedule = {"rows": _rows_at.lower(format, blocks, ids)}, None
    # The peers' schedules were made beforehand. A stack of layers makes its own, once.
    if not setup.look_inside:
        room = columns * setup.block_size
        schedule = jax.eval_shape(lambda x: make_schedule(shape, x, room, format), lengths)
        found["schedule"] = make_schedule.lower(shape, lengths, room, format)
    found["kernel"] = package_decode.lower(
        shape, "kernel", format, q, blocks, [table] * setup.calls(shape), lengths, schedule
    )
    if with_xla:
        found["xla"] = composed_decode.lower(format, *few)
        if setup.device.platform == "cpu":
            found["reference"] = package_decode.lower(shape, "xla", format, *few)
    return found


def make_calls(shape: Shape, pool: Pool, setup: Setup, programs: Programs) -> Calls:
    """The shape's tables, lengths and q."""
    caches, calls = setup.caches(shape), setup.calls(shape)
    # Arrays of their own, of which XLA cannot know that some are the same.
    tables = make_tables(shape, caches, setup.block_size) * (calls // caches)
    blocks = pool.blocks(format_of(shape, setup))
    q = make_q(shape, setup.dtype, setup.device)
    seqlens, device_tables = jax.device_put((shape.seqlens(), tables), setup.device)
    schedule = programs["schedule"](seqlens) if "schedule" in programs else None
    few = (q, blocks, device_tables[:BASELINE_CALLS], seqlens)
    return Calls(
        Timed(programs["kernel"], (q, blocks, device_tables, seqlens, schedule), calls),
        lambda result: relative_error(
            result[0], q, partial(programs["rows"], blocks), tables[-1], shape, setup.block_size
        ),
        {
            name: Timed(programs[name], few, len(few[2]))
            for name in ("xla", "reference")
            if name in programs
        },
    )


def relative_error(
    out: jax.Array,
    q: jax.Array,
    rows_at: Callable[[np.ndarray], jax.Array],
    table: np.ndarray,
    shape: Shape,
    block_size: int,
) -> float:
    """The worst head's error, of the longest sequence's last query, against naive attention."""
    sequence, tokens, columns = _longest(shape, block_size)
    rows = np.asarray(rows_at(table[sequence, :columns])).reshape(-1, D_QK)[:tokens]
    got, asked = (heads_at(array, sequence, -1) for array in (out, q))
    return attention_error(got, asked, rows, d_v=D_V, sm_scale=D_QK**-0.5)


@partial(jax.jit, static_argnums=0)
def _rows_at(format: CacheFormat, pool: jax.Array, ids: jax.Array) -> jax.Array:
    return rows_of(format, pool[ids])
