"""How long a jitted function takes on its device, and what plain XLA programs reach there."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp

BRIEF_REST_SECONDS = 0.02
LONG_SECONDS = 0.02


@dataclass(frozen=True)
class Method:
    """How one shape is timed.

    One jitted function makes `calls` calls over `caches` caches in turn, so that no call finds its
    cache in L2, and is run back to back until `sample_seconds` have passed; a sample is the wall
    time divided by all calls, launch gaps included. Where calls are short, each cache is read
    several times, so that a run takes the device longer than dispatching it takes the host. What it
    takes to start and to wait for the device, about 0.5 ms, is not in it: `lead_seconds` are timed
    by themselves, then with the sample behind them, and the difference is the sample. The schedule
    is made beforehand, except with --layers, where the function makes it once. The result is the
    median of `samples`.

    A GPU at its power limit lowers its clock within a fraction of a second. So samples are short
    and the device rests before each, as between the recorded peers' bursts of nine replays. It then
    runs for `warm_seconds` untimed: right after a rest, samples of 20 ms took 0.5 to 2.5 ms longer
    than under lasting load. One sample of `sustained_seconds` tells what is left under that.
    """

    cache_bytes: int  # that the caches of one function reach together, if max_calls allows it
    run_seconds: float  # that its calls take by the limit model, if max_calls allows it; 0: any
    min_calls: int
    max_calls: int
    samples: int
    sample_seconds: float  # 0: one run a sample
    lead_seconds: float  # 0: none, a sample's beginning and end are in it
    rest_seconds: float  # before each sample
    warm_seconds: float  # untimed, after the rest; 0: none
    sustained_seconds: float  # 0: no such sample

    def brief(self) -> Method:
        """For many shapes in little time: shorter rests, and nothing under lasting load."""
        rest = min(self.rest_seconds, BRIEF_REST_SECONDS)
        return replace(self, rest_seconds=rest, sustained_seconds=0.0)

    def caches(self, cache_bytes: int, limit_us: float = 1.0) -> int:
        """How many caches of `cache_bytes` one function reads, a call taking at least `limit_us`.

        No more than take it LONG_SECONDS: such long calls gain nothing by what L2 holds.
        """
        wanted = math.ceil(self.cache_bytes / max(1, cache_bytes))
        wanted = min(wanted, math.ceil(LONG_SECONDS * 1e6 / limit_us))
        return min(self.max_calls, max(self.min_calls, wanted))

    def rounds(self, caches: int, limit_us: float) -> int:
        """How often one function reads each of them, a call taking at least `limit_us`."""
        wanted = math.ceil(self.run_seconds * 1e6 / (caches * limit_us))
        return max(1, min(self.max_calls // caches, wanted))


METHODS = {
    "gpu": Method(
        cache_bytes=256_000_000,
        run_seconds=0.0005,
        min_calls=8,
        max_calls=128,
        samples=5,
        sample_seconds=0.020,
        lead_seconds=0.005,
        rest_seconds=0.1,
        warm_seconds=0.01,
        sustained_seconds=0.3,
    ),
    "cpu": Method(
        cache_bytes=64_000_000,
        run_seconds=0.0,
        min_calls=2,
        max_calls=4,
        samples=5,
        sample_seconds=0.0,
        lead_seconds=0.0,
        rest_seconds=0.0,
        warm_seconds=0.0,
        sustained_seconds=0.0,
    ),
}


@dataclass(frozen=True)
class Timing:
    """Microseconds per call: the median, least and greatest sample, and under lasting load."""

    us: float
    us_min: float
    us_max: float
    us_sustained: float | None


def time_calls(run: Callable[[], Any], calls: int, method: Method) -> Timing:
    """Times `run`, which dispatches a jitted function of `calls` calls and returns its results."""

    def seconds_of(repeats: int) -> float:
        out = None
        start = time.perf_counter()
        for _ in range(repeats):
            # Results are freed before the next run so that it gets the same memory: XLA records a
            # command buffer anew whenever an address in it has changed.
            out = None
            out = run()
        jax.block_until_ready(out)
        return time.perf_counter() - start

    return take_samples(seconds_of, calls, method)


def take_samples(seconds_of: Callable[[int], float], calls: int, method: Method) -> Timing:
    """Samples of whatever takes seconds_of(repeats), `calls` calls each time."""
    for _ in range(3):  # compile; record the command buffer; settle
        once = seconds_of(1)

    def per_call(sample_seconds: float) -> float:
        """Microseconds a call in a sample that long."""
        time.sleep(method.rest_seconds)
        a_run = once  # one alone takes longer
        if method.warm_seconds > 0:
            warm = math.ceil(method.warm_seconds / once)
            a_run = seconds_of(warm) / warm
        lead = math.ceil(method.lead_seconds / a_run)
        runs = max(1, math.ceil(sample_seconds / a_run))
        before = seconds_of(lead) if lead > 0 else 0.0
        return (seconds_of(lead + runs) - before) / (runs * calls) * 1e6

    samples = [per_call(method.sample_seconds) for _ in range(method.samples)]
    sustained = per_call(method.sustained_seconds) if method.sustained_seconds > 0 else None
    return Timing(statistics.median(samples), min(samples), max(samples), sustained)


@dataclass(frozen=True)
class Ceilings:
    """What plain XLA programs reach on this device in this run, in their fastest sample."""

    copy_gbs: float  # x + 1 over float32: bytes read and written
    read_gbs: float  # a sum over float32: bytes read
    matmul_tflops: float
    matmul_size: int  # of the square operands
    matmul_dtype: str
    gather_gbs: Mapping[int, float] = field(default_factory=dict)  # by bytes of a row: gather.py


@jax.jit
def _copy(x: jax.Array) -> jax.Array:
    return x + 1


_sum, _matmul = jax.jit(jnp.sum), jax.jit(jnp.matmul)  # compiled once for all runs of a process


def measure_ceilings(device: jax.Device, method: Method) -> Ceilings:
    """Device copy and read bandwidth, and a square matrix product."""
    on_gpu = device.platform == "gpu"
    elements = (1 << 30) if on_gpu else (1 << 23)
    size, dtype = (8192, "bfloat16") if on_gpu else (1024, "float32")
    method = replace(method, sustained_seconds=0.0)
    with jax.default_device(device):
        x = jnp.ones((elements,), jnp.float32)
        copy_us = time_calls(lambda: _copy(x), 1, method).us_min
        read_us = time_calls(lambda: _sum(x), 1, method).us_min
        a, b = jax.random.normal(jax.random.key(0), (2, size, size), dtype)
        matmul_us = time_calls(lambda: _matmul(a, b), 1, method).us_min
    return Ceilings(
        copy_gbs=2 * x.nbytes / copy_us / 1e3,
        read_gbs=x.nbytes / read_us / 1e3,
        matmul_tflops=2 * size**3 / matmul_us / 1e6,
        matmul_size=size,
        matmul_dtype=dtype,
    )
