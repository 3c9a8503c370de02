"""`bench --operation index_scores` and `index_topk`, and their peers."""

from __future__ import annotations

import dataclasses
import gc
import importlib
import importlib.util
import sys
import types
import weakref

import jax
import numpy as np
import pytest

import fake_flashmla
from fake_flashmla import Tensor
from jax_flashmla import index_scores
from jax_flashmla.bench import document, run
from jax_flashmla.bench.indexer import inputs, live_peer, peers, topk_calls
from jax_flashmla.bench.indexer.grids import SCORES_GRIDS, TOPK_GRIDS
from jax_flashmla.bench.indexer.shapes import ScoresShape, TopkShape
from jax_flashmla.bench.limits import H100_READ_GBS, limits_of
from jax_flashmla.bench.measure import METHODS, Ceilings
from jax_flashmla.bench.setup import Setup
from jax_flashmla.cli import main

pytestmark = pytest.mark.usefixtures("on_cpu")

H100 = "NVIDIA H100 80GB HBM3"
CEILINGS = Ceilings(3000.0, H100_READ_GBS, 650.0, 8192, "bfloat16")
LIMITS = limits_of("gpu", H100, CEILINGS)


@pytest.fixture(autouse=True)
def quick_ceilings(monkeypatch):
    monkeypatch.setattr(run, "measure_ceilings", lambda device, method: CEILINGS)


def bench(file, *options: str) -> list[dict]:
    """The measured shapes."""
    assert main(["bench", *options, "--grid", "tiny", "--json", str(file)]) == 0
    return document.read(file)["shapes"]


def fake_peers(**replaced) -> live_peer.Indexers:
    """DeepGEMM and SGLang's library of our operations and NumPy, on the fake PyTorch."""

    def logits(q, blocks, weights, seqlens, table, schedule, s_k, clean):
        assert (schedule, clean, s_k) == ("schedule", False, seqlens.array[0, -1])
        b, s_q, heads, _ = q.shape
        assert blocks.shape[1:] == (64, 1, 132)
        scores = index_scores(
            q.array,
            weights.array.reshape(b, s_q, heads),
            blocks.array.reshape(len(blocks.array), -1),
            table.array,
            seqlens.array[:, -1],
            format=inputs.FORMAT,
        )
        return Tensor(np.asarray(scores).reshape(b * s_q, -1))

    def fast_topk(scores, positions, seen, starts):
        assert starts is None
        for row, out, n in zip(scores.array, positions.array, seen.array, strict=True):
            out[:] = np.argsort(row[:n], kind="stable")[-len(out) :]

    fake = fake_flashmla.make().torch
    fake.cuda.get_device_properties = lambda index: types.SimpleNamespace(multi_processor_count=1)
    deep_gemm = types.SimpleNamespace(
        get_paged_mqa_logits_metadata=lambda seqlens, block, parts: "schedule",
        fp8_paged_mqa_logits=logits,
    )
    return live_peer.Indexers(fake, **{"deep_gemm": deep_gemm, "fast_topk": fast_topk, **replaced})


def test_tiny_grid_is_measured_and_drawn(tmp_path):
    file, plots = tmp_path / "tiny.json", tmp_path / "plots"
    keys, given = bench(file, "--operation", "index_topk")
    assert (keys["tokens"], given["heads"]) == (400, 0)
    for shape in (keys, given):
        assert shape["relative_error"] < 1e-6
        assert "xla_error" not in shape, shape["xla_error"]
        assert min(shape["xla_us"], shape["reference_us"]) > 0
        assert not {"peers", "live_peer_us"} & set(shape)
    assert main(["bench", "--from", str(file), "--plots", str(plots)]) == 0
    assert {path.name for path in plots.iterdir()} == {"tiny_latency.png", "tiny_roofline.png"}


def test_peers_are_timed_beside_the_shapes_that_they_take(tmp_path, monkeypatch):
    monkeypatch.setattr(live_peer, "load", fake_peers)
    monkeypatch.setattr(live_peer, "TOPK", 70)
    monkeypatch.setattr(live_peer, "HEADS", (4,))
    for operation in ("index_scores", "index_topk"):
        options = ("--operation", operation, "--xla", "none", "--peers")
        taken, other = bench(tmp_path / "x.json", *options)
        us = fake_flashmla.REPLAY_MS * 1e3 / taken["calls"]
        assert taken["live_peer_us"] == pytest.approx(us)
        assert taken["live_peer_relative_error"] < 1e-5
        assert not {"live_peer_us", "live_peer_error"} & set(other)


def test_given_scores_are_selected_from_by_one_peer_alone():
    shape = TopkShape(1, 3, 0, 130, 20)
    setup = Setup(jax.devices("cpu")[0], METHODS["cpu"], LIMITS, "bfloat16", 64, False)
    given = inputs.make_inputs(shape, inputs.make_pool([shape], setup), setup)
    alone = fake_peers(deep_gemm=None)
    assert live_peer.peer_calls(shape, (given,), alone) == []  # of another topk
    peer_calls = live_peer.peer_calls(dataclasses.replace(shape, topk=2048), (given,), alone)
    assert len(peer_calls) == len(given.tables)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(live_peer, "TOPK", 20)
        positions = live_peer.peer_calls(shape, (given,), alone)[-1]().array
    assert topk_calls.relative_error(positions, shape, given) == 0
    assert topk_calls.relative_error(positions % 130 - 1, shape, given) > 1e-3
    assert live_peer.peer_calls(ScoresShape(1, 1, 64, 130), (given,), alone) == []


def test_a_peer_s_scores_are_alive_together_as_ours_are():
    """Else its next call would overwrite, in L2, what ours write to DRAM."""
    shape = ScoresShape(1, 1, 32, 130)
    setup = Setup(jax.devices("cpu")[0], METHODS["cpu"], LIMITS, "bfloat16", 64, False)
    given = inputs.make_inputs(shape, inputs.make_pool([shape], setup), setup)
    peer_calls = live_peer.peer_calls(shape, (given,), fake_peers())
    results = [weakref.ref(call()) for call in peer_calls]
    assert len({id(result()) for result in results} - {id(None)}) == len(given.tables) > 1
    del peer_calls
    gc.collect()
    assert [result() for result in results] == [None] * len(results)


def test_what_peers_need_is_named(monkeypatch, capsys, tmp_path):
    spec = types.SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    real, ours = importlib.util.find_spec, {"sgl_kernel": None, "deep_gemm": None}
    find = lambda name, *rest: ours[name] if name in ours else real(name, *rest)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", find)
    assert main(["bench", "--operation", "index_topk", "--grid", "tiny", "--peers"]) == 2
    assert "sgl-deep-gemm or sglang-kernel and found neither" in " ".join(
        capsys.readouterr().out.split()
    )
    library = tmp_path / "sm90" / "common_ops.abi3.so"
    library.parent.mkdir()
    library.touch()
    ours["sgl_kernel"] = spec
    loaded = []
    ops = types.SimpleNamespace(
        load_library=loaded.append, sgl_kernel=types.SimpleNamespace(fast_topk="its top-k")
    )
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(ops=ops))
    found = live_peer.load()
    assert (found.deep_gemm, found.fast_topk) == (None, "its top-k")
    assert loaded == [str(library)]


def test_recorded_peers_are_compared_with_their_like_only():
    both = TopkShape(64, 1, 64, 32768)
    like = {"device_kind": H100, "dtype": "bfloat16", "block_size": 64}
    found = peers.comparable(both, **like)
    assert found == {"deepgemm_us": 105.57, "sglang_us": 21.4, "best_us": 105.57 + 21.4}
    assert peers.comparable(both, **{**like, "device_kind": "NVIDIA H200"}) == {}
    assert peers.comparable(TopkShape(64, 1, 64, 32768, 512), **like) == {}
    assert peers.comparable(ScoresShape(64, 1, 64, 32768), **like)["best_us"] == 105.57
    assert peers.comparable(TopkShape(64, 1, 0, 32768), **like)["best_us"] == 21.4


@pytest.mark.parametrize("grids", [SCORES_GRIDS, TOPK_GRIDS])
def test_shapes_of_a_grid_are_distinct_and_fit_an_h100(grids):
    for grid in grids.values():
        found = grid.shapes()
        assert len(found) == len(set(found)) > 0
        for shape in found:
            setup = Setup(None, METHODS["gpu"], LIMITS, "bfloat16", 64, False)
            assert inputs.memory(shape, setup) < 54e9  # what JAX takes of 80 GB, less 10%


def test_limit_is_reading_and_a_launch():
    scores = ScoresShape(64, 1, 64, 32768)
    assert LIMITS.us(scores) == pytest.approx(64 * 32768 * 136 / 3.2e6 + 2, rel=1e-2)
    assert LIMITS.us(TopkShape(1, 1, 0, 4096)) == pytest.approx(2, abs=0.1)
    many = ScoresShape(1, 2048, 64, 65536)
    assert LIMITS.us(many) == pytest.approx(many.flops / 860e6 + 2)
