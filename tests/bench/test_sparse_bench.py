"""`bench --operation sparse_decode`, fp8 caches, and peers that are timed in the same run."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import sys
import types

import jax
import numpy as np
import pytest

import fake_flashmla
from jax_flashmla import CacheFormat
from jax_flashmla.bench import document, live, run
from jax_flashmla.bench.limits import H100_READ_GBS, limits_of
from jax_flashmla.bench.measure import METHODS, Ceilings, take_samples
from jax_flashmla.bench.setup import Setup
from jax_flashmla.bench.sparse_decode import calls, peers
from jax_flashmla.bench.sparse_decode.grids import GRIDS
from jax_flashmla.bench.sparse_decode.shapes import FORMATS, Shape
from jax_flashmla.cli import main

pytestmark = pytest.mark.usefixtures("on_cpu")

H100 = "NVIDIA H100 80GB HBM3"
CEILINGS = Ceilings(3000.0, H100_READ_GBS, 650.0, 8192, "bfloat16")


@pytest.fixture
def quick_ceilings(monkeypatch):
    monkeypatch.setattr(run, "measure_ceilings", lambda device, method: CEILINGS)
    monkeypatch.setattr(run, "measure_gather", lambda device, method, row_bytes: 2.0 * row_bytes)


def bench(file, *options: str) -> list[dict]:
    """The measured shapes."""
    assert main(["bench", *options, "--json", str(file)]) == 0
    return document.read(file)["shapes"]


def test_tiny_grid_is_measured_and_drawn(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run, "measure_ceilings", lambda device, method: CEILINGS)
    file, plots = tmp_path / "tiny.json", tmp_path / "plots"
    found = bench(file, "--operation", "sparse_decode", "--grid", "tiny", "--block-size", "16")
    assert "rows gathered" in capsys.readouterr().out
    assert [s["format"] for s in found] == ["v32", "v4", "dense"]
    for shape in found:
        assert shape["relative_error"] < 1e-2
        for baseline in ("reference", "xla"):
            assert shape[f"{baseline}_us"] > 0
        assert "peers" not in shape
        assert "live_peer_us" not in shape
    assert found[1]["gathered_tokens"] == 2 * (30 + 65)
    measured = document.read(file)["limits"]["gather_gbs"]
    assert set(measured) == {"584", "656", "1152"}
    assert min(measured.values()) > 0
    assert main(["bench", "--from", str(file), "--plots", str(plots)]) == 0
    assert {path.name for path in plots.iterdir()} == {"tiny_latency.png", "tiny_roofline.png"}


def test_a_peer_runs_as_much_before_its_samples_as_our_kernel():
    """A hot GPU's clock falls: what ran before a sample is in its time."""
    asked, graph = [], fake_flashmla.Graph()
    method = dataclasses.replace(METHODS["gpu"], rest_seconds=0.0, sustained_seconds=0.0)

    def seconds_of(runs: int) -> float:
        asked.append(runs)
        return runs * fake_flashmla.REPLAY_MS / 1e3

    ours = take_samples(seconds_of, 2, method)
    us = fake_flashmla.make(graph).time_us([lambda: None] * 2, method)
    assert (us, ours.us) == pytest.approx((fake_flashmla.REPLAY_MS * 1e3 / 2,) * 2)
    assert graph.replays == sum(asked)


@pytest.mark.usefixtures("quick_ceilings")
def test_peers_are_timed_beside_the_shapes_that_they_take(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(live, "load", fake_flashmla.make)
    options = ("--operation", "sparse_decode", "--grid", "tiny", "--xla", "none", "--peers")
    v32, v4, dense = bench(tmp_path / "sparse.json", *options)
    for shape in (v32, v4):
        us = fake_flashmla.REPLAY_MS * 1e3 / shape["calls"]
        assert shape["live_peer_us"] == pytest.approx(us)
        assert shape["speedup_vs_live_peer"] == pytest.approx(us / shape["us"])
        assert shape["live_peer_relative_error"] < 1e-2
    assert not {"live_peer_us", "live_peer_error"} & set(dense)
    assert "speed against the peer in the same run:" in capsys.readouterr().out

    fp8 = ("--grid", "tiny_fp8", "--xla", "none", "--peers")
    v32, fp8_row = bench(tmp_path / "fp8.json", *fp8)
    assert v32["relative_error"] < 1e-2
    assert (v32["format"], fp8_row["format"]) == ("v32", "fp8_row")
    assert fp8_row["relative_error"] < 1e-2
    for shape in (v32, fp8_row):  # fp8 queries, and v32's rows stored anew
        assert 1e-2 < shape["live_peer_relative_error"] < 0.1
    (bf16,) = bench(tmp_path / "b.json", "--grid", "tiny", "--shapes", "b=2", *fp8[2:])
    assert bf16["live_peer_relative_error"] < 1e-2


@pytest.mark.usefixtures("quick_ceilings")
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda *_: (fake_flashmla.Tensor(np.zeros((2, 1, 64, 512))),) * 4, "something else"),
        (lambda *_: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_a_peer_that_fails_costs_no_shape(tmp_path, capsys, monkeypatch, wrong, message):
    monkeypatch.setattr(live, "load", lambda: fake_flashmla.make(sparse_decode_fwd=wrong))
    options = ("--operation", "sparse_decode", "--grid", "tiny", "--shapes", "b=2,h_q=4")
    (shape,) = bench(tmp_path / "x.json", *options, "--xla", "none", "--peers")
    assert message in shape["live_peer_error"]
    assert "speedup_vs_live_peer" not in shape
    assert f"the peer beside: {shape['live_peer_error']}" in capsys.readouterr().out


def test_what_peers_need_is_named(tmp_path, capsys, monkeypatch):
    options = ["bench", "--operation", "sparse_decode", "--grid", "tiny", "--peers"]
    spec = types.SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    real = importlib.util.find_spec
    find = lambda name, *rest: spec if name == live.PACKAGE else real(name, *rest)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", find)
    monkeypatch.setitem(sys.modules, "torch", None)
    assert main(options) == 2
    assert "of the package sgl-flash-mla and found none" in " ".join(
        capsys.readouterr().out.split()
    )
    (tmp_path / "_C_legacy.abi3.so").touch()
    assert main(options) == 2
    assert "--peers needs PyTorch" in capsys.readouterr().out


def test_the_library_found_is_loaded(tmp_path, monkeypatch):
    (tmp_path / "_C_legacy.abi3.so").touch()
    spec = types.SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    loaded = []
    ops = types.SimpleNamespace(load_library=loaded.append, flash_mla_legacy="its operations")
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(ops=ops))
    assert live.load().ops == "its operations"
    assert loaded == [str(tmp_path / "_C_legacy.abi3.so")]


def test_formats_are_the_package_s():
    for name, (d_qk, row_bytes) in FORMATS.items():
        format = CacheFormat(name=name)
        assert (format.d_qk, format.bytes_per_token) == (d_qk, row_bytes)


def test_limit_model_is_the_recorded_one():
    """Our limits are those beside FlashMLA's numbers, up to their rounding."""
    gather_gbs = {size: 1000.0 for _, size in FORMATS.values()}  # XLA's, less than what is recorded
    ceilings = Ceilings(3000.0, H100_READ_GBS, 650.0, 8192, "bfloat16", gather_gbs)
    limits = limits_of("gpu", H100, ceilings)
    rows = peers.document()["rows"]
    for row, (shape, recorded) in zip(rows, peers.recorded().items(), strict=True):
        assert recorded["best_us"] == row["flashmla_us"]
        assert limits.us(shape) == pytest.approx(row["limit_us"], abs=0.06 + 1e-3 * row["limit_us"])


@pytest.mark.parametrize(
    ("platform", "kind", "expected"),
    [
        ("gpu", H100, 2600.0),
        ("gpu", "NVIDIA H200", 4580 * 2600 / H100_READ_GBS),
        ("gpu", "NVIDIA GH200 480GB", 1000.0),
        ("cpu", "cpu", 1000.0),
    ],
)
def test_rows_are_gathered_as_fast_as_the_device_allows(platform, kind, expected):
    ceilings = Ceilings(3000.0, H100_READ_GBS, 650.0, 8192, "bfloat16", {656: 1000.0, 100: 7.0})
    limits = limits_of(platform, kind, ceilings)
    assert limits.gather_gbs == pytest.approx({656: expected, 100: 7.0})


def test_peers_are_compared_with_their_like_only():
    shape = Shape(64, 1, 64, 2048)
    like = {"device_kind": H100, "dtype": "bfloat16", "block_size": 64}
    assert peers.comparable(shape, **like) == peers.recorded()[shape]
    for name, value in {"device_kind": "NVIDIA H200", "dtype": "float16", "block_size": 16}.items():
        assert peers.comparable(shape, **{**like, name: value}) == {}
    assert peers.comparable(Shape(64, 1, 20, 2048), **like) == {}


@pytest.mark.parametrize("name", sorted(GRIDS))
def test_shapes_of_a_grid_are_distinct_and_fit_an_h100(name):
    found = GRIDS[name].shapes()
    assert len(found) == len(set(found)) > 0
    limits = limits_of("gpu", H100, CEILINGS)
    for shape in found:
        assert max(shape.topk, shape.extra_topk) <= shape.s_k
        setup = Setup(None, METHODS["gpu"], limits, "bfloat16", 64, False)
        assert calls.memory(shape, setup) < 54e9  # what JAX takes of 80 GB by default, less 10%


def test_off_table_is_wide():
    found = GRIDS["off_table"].shapes()
    assert {shape.h_q for shape in found} >= {1, 8, 16, 20, 32, 64, 96, 128}
    assert {shape.topk for shape in found} >= {128, 512, 1024, 2048}
    assert {shape.s_q for shape in found} == {1, 3, 4, 4096}
    assert {shape.format for shape in found} == set(FORMATS)
    assert not set(found) & set(GRIDS["targets"].shapes())


def test_indices_are_distinct_and_of_their_own_sequence():
    shape = Shape(2, 3, 1, 100, 40, "v4", s_k=200)
    picks = calls.make_picks(shape, 2, 64)
    run = 2 * 2 * 4
    regions: list[set[int]] = []
    for cache, (main_slots, extra) in enumerate(picks):
        assert (main_slots.shape, extra.shape) == ((2, 3, 100), (2, 3, 40))
        for slots in (main_slots, extra):
            assert set((slots // 64 // run).ravel()) == {cache}
            for of_sequence in slots:
                assert all(len(set(one)) == len(one) for one in of_sequence.tolist())
                regions.append(set((of_sequence // 64).ravel()))
    assert not any(a & b for i, a in enumerate(regions) for b in regions[:i])


@pytest.mark.parametrize(
    "shape",
    [Shape(4, 1, 64, 2048), Shape(4, 1, 64, 128, 512, "v4"), Shape(1, 1, 128, 128, 1024, "v4")],
    ids=str,
)
def test_schedule_has_as_many_parts_as_the_call_would_choose(shape):
    format = CacheFormat(name=shape.format, block_size=64, dtype="bfloat16")
    schedule = jax.eval_shape(lambda: calls.make_schedule(shape, format))
    q = jax.ShapeDtypeStruct((shape.b, shape.s_q, shape.h_q, shape.d_qk), "bfloat16")
    blocks = jax.ShapeDtypeStruct((9, *format.block_shape), format.storage_dtype)
    picks = tuple(
        jax.ShapeDtypeStruct((shape.b, shape.s_q, topk), "int32")
        for topk in (shape.topk, shape.extra_topk)
        if topk
    )
    lowered = calls.package_decode.lower(format, "kernel", q, blocks, [picks], None).as_text()
    cuts = re.search(r"custom_call @flashmla_make_schedule_v1.* -> tensor<(\d+)x2xi32>", lowered)
    assert cuts
    assert int(cuts[1]) == schedule.cuts.shape[0]
