"""Builds a shape's caches and indices and the functions that attend to them; checks a result."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_flashmla
from jax_flashmla import CacheFormat
from jax_flashmla._limits import MAX_BATCH
from jax_flashmla._num_parts import sparse_num_parts
from jax_flashmla.bench.ahead import Lowered, Programs
from jax_flashmla.bench.attention_error import attention_error, heads_at
from jax_flashmla.bench.noise import normal, runs
from jax_flashmla.bench.operation import Calls, Timed
from jax_flashmla.bench.pools import Pool
from jax_flashmla.bench.setup import Setup
from jax_flashmla.bench.sparse_decode.shapes import D_V, ITEMSIZE, Shape
from jax_flashmla.ops.sparse_decode import is_narrow
from jax_flashmla.reference.rows import take_rows

MAX_RELATIVE_ERROR = 1e-2  # of one output row in the 2-norm; bf16 rounding of P and out gives 2e-3
TARGET = "flashmla_sparse_decode_v1"
BASELINE_CALLS = 4  # separate caches for the baselines: fewer, because XLA compiles every call
PARTS = 132  # of a schedule on an H100 or H200: what its workspace is sized by
TILE = 64  # indices

# Of one call: main indices, then, where there is an extra cache, those into it. Both are slots of
# the one array that holds all caches.
Picks = tuple[Any, ...]


def format_of(shape: Shape, setup: Setup) -> CacheFormat:
    return CacheFormat(name=shape.format, block_size=setup.block_size, dtype=setup.dtype)


def _regions(shape: Shape) -> int:
    """Caches of a sequence."""
    return 2 if shape.extra_topk else 1


def _cache_blocks(shape: Shape, block_size: int) -> int:
    return -(-shape.s_k // block_size)


def _pool_blocks(shape: Shape, setup: Setup) -> int:
    """Blocks of all the shape's caches."""
    return setup.caches(shape) * shape.b * _regions(shape) * _cache_blocks(shape, setup.block_size)


def memory(shape: Shape, setup: Setup) -> int:
    """Bytes of device memory: caches, indices, q, outs, accumulators; the baselines' rows."""
    caches = _pool_blocks(shape, setup) * format_of(shape, setup).block_bytes
    indices = setup.calls(shape) * shape.gathered_tokens * 4
    q_and_outs = shape.query_tokens * shape.h_q * ITEMSIZE * (shape.d_qk + 2 * D_V)
    return caches + indices + q_and_outs + 2 * PARTS * shape.h_q * 4 * (D_V + 1)


def make_pool(shapes: list[Shape], setup: Setup) -> Pool:
    """Random blocks of each format for the shape that needs most."""
    most: dict[CacheFormat, int] = {}
    for shape in shapes:
        format = format_of(shape, setup)
        most[format] = max(most.get(format, 1), _pool_blocks(shape, setup))
    return Pool(most, setup.device)


def make_picks(shape: Shape, caches: int, block_size: int) -> list[Picks]:
    """Of each cache the slots int32 [b, s_q, topk] that its query tokens attend.

    A sequence's blocks are at random places within the run of the pool that is the cache's. A query
    token attends tokens in random order, all different; those of two query tokens overlap.
    """
    generator = np.random.default_rng(2)
    blocks = _cache_blocks(shape, block_size)
    order = generator.permutation(shape.s_k)
    picks = []
    for cache in range(caches):
        run = shape.b * _regions(shape) * blocks
        tables = cache * run + generator.permutation(run).reshape(_regions(shape), shape.b, blocks)
        picks.append(
            tuple(
                _pick(generator, table, order, shape.s_q, topk, block_size)
                for table, topk in zip(tables, (shape.topk, shape.extra_topk), strict=False)
            )
        )
    return picks


def _pick(
    generator: np.random.Generator,
    table: np.ndarray,
    order: np.ndarray,
    s_q: int,
    topk: int,
    block_size: int,
) -> np.ndarray:
    start = generator.integers(len(order), size=(len(table), s_q))
    slots = table[:, order // block_size] * block_size + order % block_size  # in order, [b, s_k]
    return np.stack([runs(*one, topk) for one in zip(slots, start, strict=True)])


@partial(jax.jit, static_argnums=(0, 1))
def make_schedule(shape: Shape, format: CacheFormat) -> jax_flashmla.SplitSchedule | None:
    """The shape's schedule, in as many parts as sparse_decode would choose; None where there are
    more query tokens than one takes."""
    n = shape.query_tokens
    if n > MAX_BATCH:
        return None
    tiles = sum(-(-topk // TILE) for topk in (shape.topk, shape.extra_topk))
    small_tiles = is_narrow(format.dtype, format, format if shape.extra_topk else None)
    return jax_flashmla.make_schedule(
        jnp.full(n, tiles * TILE, jnp.int32),
        h_q=shape.h_q,
        num_parts=sparse_num_parts(tiles=n * tiles, h_q=shape.h_q, small_tiles=small_tiles),
    )


@partial(jax.jit, static_argnums=(0, 1))
def package_decode(
    format: CacheFormat,
    implementation: str,
    q: jax.Array,
    blocks: jax.Array,
    picks: list[Picks],
    schedule: jax_flashmla.SplitSchedule | None,
) -> tuple[jax.Array, Any]:
    """One call for each picks, through jax_flashmla.

    Returns:
        The last call's out and, of the kernel's calls, the sum of one lse each: so every out gets
        the same memory, as in a model.
    """
    results = []
    for indices, *extra in picks:
        options: dict[str, Any] = {}
        if extra:
            options = {"extra_blocks": blocks, "extra_indices": extra[0], "extra_format": format}
        results.append(
            jax_flashmla.sparse_decode(
                q,
                blocks,
                indices,
                format=format,
                schedule=schedule,
                implementation=implementation,
                **options,
            )
        )
    outs, lses = zip(*results, strict=True)
    return outs[-1], sum(lse[0, 0, 0] for lse in lses) if implementation == "kernel" else outs


@partial(jax.jit, static_argnums=0)
def gather(format: CacheFormat, blocks: jax.Array, picks: Picks) -> jax.Array:
    """Rows [..., topk + extra_topk, d_qk] of slots [..., topk] and, if any, [..., extra_topk]."""
    rows = [
        take_rows(
            format, blocks, x // format.block_size, x % format.block_size, jnp.float32(1)
        ).squeeze(-2)
        for x in picks
    ]
    return jnp.concatenate(rows, axis=-2)


@partial(jax.jit, static_argnums=0)
def composed_decode(
    format: CacheFormat, q: jax.Array, blocks: jax.Array, picks: list[Picks]
) -> tuple[jax.Array, list[jax.Array]]:
    """As package_decode, but what a JAX user writes without it: gather, dequantise, two einsums."""

    def attend(picks: Picks) -> jax.Array:
        rows = gather(format, blocks, picks)
        scores = jnp.einsum("bshd,bskd->bshk", q, rows, preferred_element_type=jnp.float32)
        p = jax.nn.softmax(scores * format.d_qk**-0.5)
        return jnp.einsum("bshk,bskd->bshd", p.astype(q.dtype), rows[..., :D_V])

    outs = [attend(x) for x in picks]
    return outs[-1], outs


def programs(shape: Shape, pool: Pool, setup: Setup, *, with_xla: bool) -> Lowered:
    """The schedule, the kernel's calls, the rows of a check; with_xla plain XLA's calls, and on a
    CPU the pure-JAX reference's."""
    format = format_of(shape, setup)
    q = jax.ShapeDtypeStruct((shape.b, shape.s_q, shape.h_q, shape.d_qk), setup.dtype)
    blocks = pool.abstract(format)
    topks = (shape.topk, shape.extra_topk)[: _regions(shape)]
    one = tuple(jax.ShapeDtypeStruct((shape.b, shape.s_q, topk), jnp.int32) for topk in topks)
    few = [one] * min(BASELINE_CALLS, setup.calls(shape))
    last = tuple(jax.ShapeDtypeStruct((topk,), jnp.int32) for topk in topks)
    found, schedule = {"rows": gather.lower(format, blocks, last)}, None
    # FlashMLA's schedule was made beforehand. A stack of layers makes its own, once.
    if not setup.look_inside:
        schedule = jax.eval_shape(partial(make_schedule, shape, format))
    if schedule is not None:
        found["schedule"] = make_schedule.lower(shape, format)
    all_picks = [one] * setup.calls(shape)
    found["kernel"] = package_decode.lower(format, "kernel", q, blocks, all_picks, schedule)
    if with_xla:
        found["xla"] = composed_decode.lower(format, q, blocks, few)
        if setup.device.platform == "cpu":
            found["reference"] = package_decode.lower(format, "xla", q, blocks, few, None)
    return found


def make_calls(shape: Shape, pool: Pool, setup: Setup, programs: Programs) -> Calls:
    """The shape's caches, indices and q."""
    caches, calls = setup.caches(shape), setup.calls(shape)
    blocks = pool.blocks(format_of(shape, setup))
    # Arrays of their own, of which XLA cannot know that some are the same.
    picks = make_picks(shape, caches, setup.block_size) * (calls // caches)
    q = normal((shape.b, shape.s_q, shape.h_q, shape.d_qk), setup.dtype, setup.device)
    schedule = programs["schedule"]() if "schedule" in programs else None
    device_picks = jax.device_put(picks, setup.device)
    few = device_picks[:BASELINE_CALLS]
    arguments = {"xla": (q, blocks, few), "reference": (q, blocks, few, None)}
    return Calls(
        Timed(programs["kernel"], (q, blocks, device_picks, schedule), calls),
        lambda result: relative_error(result[0], q, partial(programs["rows"], blocks), picks[-1]),
        {
            name: Timed(programs[name], given, len(few))
            for name, given in arguments.items()
            if name in programs
        },
    )


def relative_error(
    out: Any, q: jax.Array, rows_at: Callable[[Picks], jax.Array], picks: Picks
) -> float:
    """The worst head's error, of the last query token, against naive attention."""
    rows = rows_at(tuple(x[-1, -1] for x in picks))
    got, asked = heads_at(out, -1, -1), heads_at(q, -1, -1)
    return attention_error(got, asked, rows, d_v=D_V, sm_scale=q.shape[-1] ** -0.5)
