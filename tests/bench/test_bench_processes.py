"""What benchmarks over several processes share."""

from __future__ import annotations

import argparse

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jax_flashmla.bench import processes


def test_every_process_makes_as_many_runs() -> None:
    runs = []
    times = processes.time_runs(lambda: runs.append(1), 3)
    assert len(times) == processes.SAMPLES
    assert len(runs) == (processes.WARM + processes.SAMPLES) * (1 + 3)
    assert all(us > 0 for us in times)
    assert processes.median_of_runs(lambda: None, 1) > 0


@pytest.mark.usefixtures("on_cpu")
def test_host_arrays_are_placed_by_their_specs() -> None:
    mesh = Mesh(np.array(jax.devices("cpu")[:2]), ("t",))
    given = {"a": np.arange(6).reshape(2, 3), "b": np.float32(4)}
    put = processes.put(given, mesh, {"a": P("t"), "b": P()})
    for name, x in given.items():
        np.testing.assert_array_equal(put[name], x)
    assert [shard.data.shape for shard in put["a"].addressable_shards] == [(1, 3)] * 2


def test_one_process_joins_nobody() -> None:
    parser = argparse.ArgumentParser()
    processes.add_arguments(parser)
    arguments = parser.parse_args([])
    assert (arguments.processes, arguments.process) == (1, 0)
    processes.join(arguments)
