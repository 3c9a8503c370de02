"""Measures one shape: checks the result, then times it and what it is compared with."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import numpy as np

from jax_flashmla.bench.ahead import Program, Programs
from jax_flashmla.bench.device import count_calls
from jax_flashmla.bench.kernel_table import profile_kernels
from jax_flashmla.bench.live import Torch
from jax_flashmla.bench.measure import Method, Timing, time_calls
from jax_flashmla.bench.operation import Calls, Operation
from jax_flashmla.bench.setup import Setup
from jax_flashmla.bench.shape import Result, Shape
from jax_flashmla.bench.stopwatch import Stopwatch

PEER_ERROR = 0.1  # a peer's may have queries in fp8; above this it solved another problem


def measure_shape(
    operation: Operation,
    shape: Shape,
    pool: Any,
    setup: Setup,
    programs: Programs,
    *,
    peer: Torch | None = None,
    profile: bool = False,
) -> Result:
    """Times one shape and its baselines; with a peer, that too; with profile, kernels.

    Raises:
        AssertionError: the result is wrong.
        Exception: whatever compiling or running it raised.
    """
    module, watch = operation.calls(), Stopwatch()
    with watch("make"):
        calls = module.make_calls(shape, pool, setup, programs)
    run = partial(calls.kernel.function, *calls.kernel.arguments)
    with watch("check"):
        error = calls.error(run())
    if not error <= module.MAX_RELATIVE_ERROR:
        raise AssertionError(f"wrong result: relative error {error:.1e}")
    with watch("time"):
        timing = time_calls(run, calls.kernel.calls, setup.method)
        limit_us, parts = _limit(shape, calls, setup)
    result = {
        **dataclasses.asdict(timing),
        "calls": calls.kernel.calls,
        "caches": setup.caches(shape),
        **_launches(programs["kernel"], module.TARGET, setup),
        **parts,
        "relative_error": error,
        "tflops": shape.flops / timing.us / 1e6,
        "gbs": shape.bytes / timing.us / 1e3,
        "limit_us": limit_us,
        "limit_fraction": limit_us / timing.us,
    }
    recorded = operation.peers(
        shape,
        device_kind=setup.device.device_kind,
        dtype=setup.dtype,
        block_size=setup.block_size,
    )
    if recorded:
        result["peers"] = recorded
        result["speedup_vs_peers"] = recorded["best_us"] / timing.us
    if peer is not None:
        with watch("peer"):
            result |= _beside(operation, shape, calls, timing, peer, setup.method)
    if profile:
        with watch("profile"):
            kernels = profile_kernels(run, calls.kernel.calls)
            result["kernels"] = [dataclasses.asdict(kernel) for kernel in kernels]
    with watch("baselines"):
        result |= _baselines(calls, timing, setup.method)
    return result | {"wall_seconds": watch.seconds}


def _launches(kernel: Program, target: str, setup: Setup) -> Result:
    """How its custom calls are launched, if that is asked for."""
    if not setup.look_inside or kernel.compiled is None:
        return {}
    return {
        "custom_calls": count_calls(kernel.compiled, target),
        "command_buffers": kernel.capture and dataclasses.asdict(kernel.capture),
    }


def _limit(shape: Shape, calls: Calls, setup: Setup) -> tuple[float, Result]:
    """Microseconds below which a call cannot go, and what they are made of where that is timed."""
    if calls.alone is None:
        return setup.limits.us(shape), {}
    method = dataclasses.replace(setup.method, sustained_seconds=0.0)
    run = partial(calls.alone.function, *calls.alone.arguments)
    timing = time_calls(run, calls.alone.calls, method)
    read_us = calls.read_once / setup.limits.read_gbs / 1e3
    return timing.us + read_us, {"alone_us": timing.us, "read_once_us": read_us}


def _beside(
    operation: Operation,
    shape: Shape,
    calls: Calls,
    timing: Timing,
    peer: Torch,
    method: Method,
) -> Result:
    """The peer's time and its result's error, or why it has none; empty where it has no kernel."""
    if operation.live_peer is None:
        return {}
    module = operation.live_peer()
    try:
        peer_calls = module.peer_calls(shape, calls.kernel.arguments, peer)
        if not peer_calls:
            return {}
        out = np.asarray(peer_calls[-1]().float().cpu())
        error = calls.error((out,))
        us = peer.time_us(peer_calls, method)
    except Exception as failure:
        return {"live_peer_error": first_line(failure)}
    if not error <= PEER_ERROR:
        return {"live_peer_error": f"it computes something else: relative error {error:.1e}"}
    return {
        "live_peer_us": us,
        "live_peer_relative_error": error,
        "speedup_vs_live_peer": us / timing.us,
    }


def _baselines(calls: Calls, timing: Timing, method: Method) -> Result:
    """Each baseline's time, or why it has none: the shape's own time stands then."""
    method = dataclasses.replace(method, sustained_seconds=0.0)
    result: Result = {}
    for name, baseline in calls.baselines.items():
        try:
            run = partial(baseline.function, *baseline.arguments)
            found = time_calls(run, baseline.calls, method)
        except Exception as error:  # out of memory, most likely
            result[f"{name}_error"] = first_line(error)
            continue
        result[f"{name}_us"] = found.us
        result[f"{name}_us_min"], result[f"{name}_us_max"] = found.us_min, found.us_max
        result[f"speedup_vs_{name}"] = found.us / timing.us
    return result


def first_line(error: Exception) -> str:
    """The error's type and the beginning of what it says."""
    message = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {message[:300]}"
