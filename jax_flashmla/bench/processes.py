"""Benchmarks over the devices of several processes, each of which makes the same runs."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

WARM, SAMPLES = 2, 7


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--processes", type=int, default=1, help="each has one of the devices")
    parser.add_argument("--process", type=int, default=0, help="which of them this is")
    parser.add_argument("--address", default="localhost:45454", help="of process 0")


def join(arguments: argparse.Namespace) -> None:
    """Meets the other processes. Before anything else asks for devices."""
    if arguments.processes > 1:
        jax.distributed.initialize(
            arguments.address, arguments.processes, arguments.process, arguments.process
        )


def put(tree: Any, mesh: Mesh, specs: Any) -> Any:
    """Host arrays, the same in each process, to devices of all of them."""

    def place(x: Any, spec: P) -> jax.Array:
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda i: x[i])

    return jax.tree.map(place, tree, specs)


def time_runs(run: Callable[[], Any], runs: int) -> list[float]:
    """Microseconds a run in each of SAMPLES samples, of as many runs in every process."""
    times = []
    for sample in range(WARM + SAMPLES):
        jax.block_until_ready(run())
        start = time.perf_counter()
        for _ in range(runs):
            out = run()
        jax.block_until_ready(out)
        if sample >= WARM:
            times.append((time.perf_counter() - start) / runs * 1e6)
    return times


def median_of_runs(run: Callable[[], Any], runs: int) -> float:
    return statistics.median(time_runs(run, runs))
