"""Measures one row: checks the result, then times it and what it is compared with."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax

from jax_flashmla.cli.bench import peers
from jax_flashmla.cli.bench.command_buffers import compile_and_look
from jax_flashmla.cli.bench.decode_calls import (
    MAX_RELATIVE_ERROR,
    composed_decode,
    make_q,
    make_schedule,
    make_tables,
    package_decode,
    relative_error,
)
from jax_flashmla.cli.bench.limits import Limits
from jax_flashmla.cli.bench.measure import Method, time_calls
from jax_flashmla.cli.bench.shapes import D_QK, D_V, ITEMSIZE, Row
from jax_flashmla.cli.device import count_decode_calls

BASELINE_CALLS = 8  # separate caches for the baselines: fewer, because XLA compiles every call
PARTS = 132  # of a schedule on an H100 or H200: what its workspace is sized by


@dataclass(frozen=True)
class Setup:
    """What all rows of a run have in common."""

    device: jax.Device
    method: Method
    limits: Limits
    dtype: str
    block_size: int
    look_inside: bool  # whether to find out how the calls are launched

    def caches(self, row: Row) -> int:
        """Caches that one jitted function reads."""
        return self.method.caches(row.cached_tokens * D_QK * ITEMSIZE)

    def calls(self, row: Row) -> int:
        """Calls in one jitted function, over its caches in turn."""
        caches = self.caches(row)
        return caches * self.method.rounds(caches, self.limits.us(row))

    def pool_blocks(self, row: Row) -> int:
        """Blocks of all the row's caches."""
        return self.caches(row) * row.num_blocks(self.block_size)

    def memory(self, row: Row) -> int:
        """Bytes of device memory that a row needs: caches, q, the baselines' outs, accumulators."""
        cache = self.pool_blocks(row) * self.block_size * D_QK * ITEMSIZE
        q_and_outs = row.b * row.s_q * row.h_q * ITEMSIZE * (D_QK + BASELINE_CALLS * D_V)
        accumulators = 2 * PARTS * row.s_q * row.h_q * 4 * (D_V + 1)
        return cache + q_and_outs + accumulators


def measure_row(row: Row, pool: jax.Array, setup: Setup, *, with_xla: bool) -> dict[str, Any]:
    """Times one row and, with_xla, its baselines.

    Raises:
        AssertionError: the result is wrong.
        Exception: whatever compiling or running it raises.
    """
    caches, calls = setup.caches(row), setup.calls(row)
    # Arrays of their own, of which XLA cannot know that some are the same.
    tables = make_tables(row, caches, setup.block_size) * (calls // caches)
    q = make_q(row, pool.dtype, setup.device)
    seqlens, device_tables = jax.device_put((row.seqlens(), tables), setup.device)
    arguments = (q, pool, device_tables, seqlens)

    launched: dict[str, Any] = {}
    # The peers' schedules were made beforehand. A stack of layers makes its own, once.
    schedule = None
    if not setup.look_inside:
        schedule = make_schedule(row, seqlens, tables[0].shape[1] * setup.block_size)
    decode: Any = package_decode(row, "kernel", schedule)
    if setup.look_inside:
        decode, capture = compile_and_look(decode, *arguments)
        launched["decode_custom_calls"] = count_decode_calls(decode)
        launched["command_buffers"] = capture and dataclasses.asdict(capture)
    error = relative_error(decode(*arguments)[0], q, pool, tables[-1], row)
    if not error <= MAX_RELATIVE_ERROR:
        raise AssertionError(f"wrong result: relative error {error:.1e}")
    timing = time_calls(partial(decode, *arguments), calls, setup.method)
    limit_us = setup.limits.us(row)
    result = {
        **dataclasses.asdict(timing),
        "calls": calls,
        "caches": caches,
        **launched,
        "relative_error": error,
        "tflops": row.flops / timing.us / 1e6,
        "gbs": row.bytes / timing.us / 1e3,
        "limit_us": limit_us,
        "limit_fraction": limit_us / timing.us,
    }
    recorded = peers.comparable(
        row,
        device_kind=setup.device.device_kind,
        dtype=setup.dtype,
        block_size=setup.block_size,
    )
    if recorded:
        result["peers"] = recorded
        result["speedup_vs_peers"] = recorded["best_us"] / timing.us
    if with_xla:
        few = (q, pool, device_tables[:BASELINE_CALLS], seqlens)
        for name, us in _baselines(row, few, setup).items():
            if isinstance(us, str):
                result[f"{name}_error"] = us
            else:
                result[f"{name}_us"] = us
                result[f"speedup_vs_{name}"] = us / timing.us
    return result


def _baselines(row: Row, arguments: tuple[Any, ...], setup: Setup) -> dict[str, float | str]:
    """Microseconds of each baseline, or why there are none: the row's own time stands then."""
    functions = {"xla": composed_decode()}
    if setup.device.platform == "cpu":
        functions["reference"] = package_decode(row, "xla")
    results: dict[str, float | str] = {}
    for name, function in functions.items():
        try:
            run = partial(function, *arguments)
            results[name] = time_calls(run, len(arguments[2]), setup.method).us
        except Exception as error:  # out of memory, most likely
            results[name] = first_line(error)
    return results


def first_line(error: Exception) -> str:
    """The error's type and the beginning of what it says."""
    message = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {message[:300]}"
