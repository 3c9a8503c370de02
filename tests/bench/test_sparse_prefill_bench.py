"""`bench --operation sparse_prefill`."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import fake_flashmla
from jax_flashmla.bench import document, live, run
from jax_flashmla.bench.ahead import compile_shapes
from jax_flashmla.bench.limits import H100_READ_GBS, limits_of
from jax_flashmla.bench.measure import METHODS, Ceilings
from jax_flashmla.bench.setup import Setup
from jax_flashmla.bench.sparse_prefill import calls, peers
from jax_flashmla.bench.sparse_prefill.grids import GRIDS
from jax_flashmla.bench.sparse_prefill.shapes import Shape
from jax_flashmla.cli import main

pytestmark = pytest.mark.usefixtures("on_cpu")

H100 = "NVIDIA H100 80GB HBM3"
CEILINGS = Ceilings(3000.0, H100_READ_GBS, 650.0, 8192, "bfloat16", {1152: 2000.0, 1024: 2000.0})


def test_tiny_grid_is_measured_beside_a_peer(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "measure_ceilings", lambda device, method: CEILINGS)
    monkeypatch.setattr(run, "measure_gather", lambda device, method, row_bytes: 2.0 * row_bytes)
    monkeypatch.setattr(live, "load", fake_flashmla.make)
    file = tmp_path / "tiny.json"
    options = ("--operation", "sparse_prefill", "--grid", "tiny", "--shapes", "d_qk=576", "--peers")
    assert main(["bench", *options, "--json", str(file)]) == 0
    (shape,) = document.read(file)["shapes"]
    assert shape["gathered_tokens"] == 3 * 70
    assert shape["relative_error"] < 1e-2
    assert shape["live_peer_relative_error"] < 1e-2
    assert shape["xla_us"] > 0
    assert shape["reference_us"] > 0


@pytest.mark.parametrize("name", sorted(GRIDS))
def test_shapes_of_a_grid_are_distinct_and_fit_an_h100(name):
    found = GRIDS[name].shapes()
    assert len(found) == len(set(found)) > 0
    setup = Setup(None, METHODS["gpu"], limits_of("gpu", H100, CEILINGS), "bfloat16", 64, False)
    for shape in found:
        assert shape.topk <= shape.s_kv
        assert calls.memory(shape, setup) < 54e9  # what JAX takes of 80 GB by default, less 10%


def test_recorded_rates_follow_from_shapes():
    for row, (shape, times) in zip(peers.document()["rows"], peers.recorded().items(), strict=True):
        assert shape.flops / times["flashmla_us"] / 1e6 == pytest.approx(row["tflops"], rel=1e-3)
    like = {"device_kind": H100, "dtype": "bfloat16", "block_size": 64}
    assert peers.comparable(shape, **like) == times
    assert peers.comparable(shape, **{**like, "dtype": "float16"}) == {}


def test_a_wrong_result_is_seen():
    shape = Shape(3, 2, 8, 20)
    limits = limits_of("gpu", H100, CEILINGS)
    setup = Setup(jax.devices("cpu")[0], METHODS["cpu"], limits, "bfloat16", 64, False)
    (programs,) = compile_shapes([lambda: calls.programs(shape, None, setup, with_xla=False)])
    made = calls.make_calls(shape, None, setup, programs)
    q, sources = made.kernel.arguments
    out = np.asarray(made.kernel.function(q, sources)[0])
    assert made.error((out,)) < calls.MAX_RELATIVE_ERROR < made.error((out * 1.1,))
