"""`jax-flashmla bench`: tiny shapes on the CPU through all of its code, grids, limits, summary."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import pathlib
import subprocess
import sys

import jax
import pytest

from jax_flashmla import CacheFormat, kernel_refusal
from jax_flashmla.bench import command_buffers, document, measure, run, summary
from jax_flashmla.bench.dense_decode import OPERATION, calls, peers
from jax_flashmla.bench.dense_decode.calls import make_q, make_tables, package_decode
from jax_flashmla.bench.dense_decode.grids import GRIDS
from jax_flashmla.bench.dense_decode.shapes import Shape
from jax_flashmla.bench.device import count_calls
from jax_flashmla.bench.limits import H200, Limits, limits_of
from jax_flashmla.bench.measure import METHODS, Ceilings, time_calls
from jax_flashmla.bench.pools import random_blocks
from jax_flashmla.bench.setup import Setup
from jax_flashmla.cli import main

ROOT = pathlib.Path(__file__).parents[2]
CEILINGS = Ceilings(3000.0, 2800.0, 650.0, 8192, "bfloat16")


@pytest.fixture
def quick_ceilings(monkeypatch):
    """The ceilings are measured in the test that looks at them."""
    monkeypatch.setattr(run, "measure_ceilings", lambda device, method: CEILINGS)


@pytest.mark.parametrize(
    ("warm_seconds", "lead_seconds", "sustained_seconds", "runs"),
    [(0.0, 0.0, 0.0, 5), (0.0, 0.0, 1e-12, 6), (1e-12, 0.0, 0.0, 10), (1e-12, 1e-12, 1e-12, 24)],
)
def test_a_sample_is_warmed_up_untimed_if_the_method_says_so(
    warm_seconds, lead_seconds, sustained_seconds, runs
):
    """Five samples, and one under lasting load."""
    made = []
    method = dataclasses.replace(
        METHODS["cpu"],
        samples=5,
        warm_seconds=warm_seconds,
        lead_seconds=lead_seconds,
        sustained_seconds=sustained_seconds,
    )
    timing = time_calls(lambda: made.append(None), 1, method)
    assert len(made) == 3 + runs
    assert (timing.us_sustained is None) == (sustained_seconds == 0)
    assert timing.us_min <= timing.us <= timing.us_max


@pytest.mark.parametrize(
    ("cache_bytes", "limit_us", "caches", "rounds"),
    [
        (10**9, 250.0, 8, 1),  # long calls
        (18_900_000, 9.2, 14, 4),  # fourteen of these take less than half a millisecond
        (590_000, 5.1, 128, 1),  # no more than max_calls
        (4_000_000, 6.0, 64, 2),
        (9_400_000, 1_350.0, 15, 1),  # a prompt's: 28 of them would take long
    ],
)
def test_short_calls_read_their_caches_several_times(cache_bytes, limit_us, caches, rounds):
    method = METHODS["gpu"]
    assert method.caches(cache_bytes, limit_us) == caches
    assert method.rounds(caches, limit_us) == rounds


@pytest.mark.usefixtures("on_cpu")
def test_xla_keeps_calls_over_the_same_cache_apart():
    shape = Shape(2, 1, 4, 96)
    device = jax.devices("cpu")[0]
    tables = make_tables(shape, 1, 16) * 3
    pool = random_blocks(CacheFormat(block_size=16), shape.num_blocks(16))
    arguments = (make_q(shape, "bfloat16", device), pool, tables, shape.seqlens())
    lowered = package_decode.lower(shape, "kernel", CacheFormat(block_size=16), *arguments)
    assert count_calls(lowered.compile()) == 3


def test_what_a_sample_takes_to_start_is_not_in_it(monkeypatch):
    now, idle = 0.0, True

    def run():
        nonlocal now, idle
        now += 7.0 + (500.0 if idle else 0.0)
        idle = False

    def wait(_):
        nonlocal idle
        idle = True

    monkeypatch.setattr(measure.time, "perf_counter", lambda: now)
    monkeypatch.setattr(measure.jax, "block_until_ready", wait)
    method = dataclasses.replace(METHODS["cpu"], samples=3, sample_seconds=2000.0, lead_seconds=1.0)
    assert time_calls(run, 1, method).us == pytest.approx(7e6)


def test_the_hopper_kernel_takes_every_block_size_on_offer():
    refusals = [kernel_refusal("cuda", block_size=size) for size in OPERATION.block_sizes]
    assert not any("block_size" in refusal for refusal in refusals if refusal)


def bench(*options: str) -> int:
    return main(["bench", *options])


@pytest.mark.usefixtures("on_cpu")
def test_tiny_grid_is_measured_recorded_drawn_and_shown_again(tmp_path, capsys):
    file, plots = tmp_path / "tiny.json", tmp_path / "plots"
    assert (
        bench("--grid", "tiny", "--shapes", "b=2", "--rows", "b=3,h_q=4", "--json", str(file)) == 0
    )
    measured = capsys.readouterr().out
    assert "2 shapes, 0 failed" in measured
    assert not plots.exists()

    found = json.loads(file.read_text())
    assert set(document.FIELDS) == set(found) - {"xla_flags", "wall_seconds"}
    assert found["versions"]["jax"]
    assert found["ceilings"]["read_gbs"] > 0
    assert found["limits"]["read_gbs"] == max(
        found["ceilings"]["read_gbs"], found["ceilings"]["copy_gbs"]
    )
    assert [shape["b"] for shape in found["shapes"]] == [2, 3]
    for shape in found["shapes"]:
        assert shape["us_min"] <= shape["us"] <= shape["us_max"]
        assert shape["relative_error"] < 1e-2
        for baseline in ("reference", "xla"):
            speedup = shape[f"{baseline}_us"] / shape["us"]
            assert shape[f"speedup_vs_{baseline}"] == pytest.approx(speedup)
        assert shape["limit_fraction"] == pytest.approx(shape["limit_us"] / shape["us"])
        assert "peers" not in shape

    assert bench("--from", str(file), "--plots", str(plots)) == 0
    shown = capsys.readouterr().out
    drawn = [plots / "tiny_latency.png", plots / "tiny_roofline.png"]
    assert measured.splitlines()[-2] in shown
    assert sorted(plots.iterdir()) == drawn
    for path in drawn:
        assert str(path) in shown
        assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("on_cpu", "quick_ceilings")
def test_other_blocks_types_and_layers(tmp_path):
    file = tmp_path / "tiny.json"
    options = ("--block-size", "16", "--dtype", "float16", "--layers", "3", "--xla", "none")
    assert bench("--grid", "tiny", *options, "--json", str(file)) == 0
    found = document.read(file)
    assert (found["block_size"], found["dtype"]) == (16, "float16")
    for shape in found["shapes"]:
        assert shape["calls"] == shape["custom_calls"] == 3
        assert shape["command_buffers"] is None  # a GPU's
        assert "xla_us" not in shape


@pytest.mark.usefixtures("on_cpu", "quick_ceilings")
def test_one_shape_that_fails_costs_no_other(tmp_path, capsys, monkeypatch):
    real = calls.relative_error
    monkeypatch.setattr(
        calls, "relative_error", lambda *x: float("nan") if x[-2].b == 3 else real(*x)
    )
    file = tmp_path / "tiny.json"
    assert bench("--grid", "tiny", "--xla", "none", "--json", str(file)) == 1
    assert "3 shapes, 1 failed" in capsys.readouterr().out
    errors = [shape.get("error") for shape in document.read(file)["shapes"]]
    assert errors == [None, "AssertionError: wrong result: relative error nan", None]


@pytest.mark.usefixtures("on_cpu", "quick_ceilings")
def test_interrupt_keeps_what_was_measured(tmp_path, capsys, monkeypatch):
    real = run.measure_shape

    def interrupted(operation, shape, *arguments, **options):
        if shape.b == 3:
            assert document.read(file)["interrupted"], "a killed run would not say that it was"
            raise KeyboardInterrupt
        return real(operation, shape, *arguments, **options)

    file = tmp_path / "tiny.json"
    monkeypatch.setattr(run, "measure_shape", interrupted)
    assert bench("--grid", "tiny", "--xla", "none", "--json", str(file)) == 130
    assert "1 shape, 0 failed" in capsys.readouterr().out
    found = document.read(file)
    assert found["interrupted"]
    assert [shape["b"] for shape in found["shapes"]] == [2]


@pytest.mark.usefixtures("on_cpu")
def test_no_shape_is_left(capsys):
    assert bench("--grid", "tiny", "--shapes", "b=77") == 2
    assert "no shape of grid 'tiny' meets --shapes b=77" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rows", "heads=3"], "field=value with field in b, s_q, h_q, s_k, lengths, format"),
        (["--rows", "b"], "got 'b'"),
        (["--layers", "0"], "layers must be at least 1, got 0"),
        (["--block-size", "48"], "invalid choice"),
        (["--grid", "all"], "--grid of dense_decode must be one of targets, quick, off_table"),
        (["--grid", "v32"], "got v32 (a grid of layer_step)"),
        (["--operation", "layer_step", "--grid", "off_table"], "(a grid of dense_decode, sparse"),
        (["--from", "no-such-file"], "No such file"),
        (["--from", str(ROOT / "README.md")], "is not JSON"),
        (["--from", str(peers.FILE)], "holds no benchmark results: it lacks hardware"),
        (["--from", str(peers.FILE), "--dtype", "float16"], "--from measures nothing"),
    ],
)
def test_bad_options_are_named(options, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench(*options)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_help_lists_the_grids_of_each_operation(capsys):
    with pytest.raises(SystemExit) as stopped:
        bench("--help")
    assert stopped.value.code == 0
    _, _, listed = capsys.readouterr().out.partition("\ngrids, ")
    lines = [line.strip() for line in listed.splitlines()[1:]]
    assert dict(zip(lines[::2], lines[1::2], strict=True)) == {
        "dense_decode": "targets, quick (GPU), off_table, fp8, tiny_fp8, layers, xla, cpu (CPU), "
        "tiny",
        "index_scores": "indexer, quick (GPU), xla, cpu (CPU), tiny",
        "index_topk": "indexer, quick (GPU), xla, cpu (CPU), tiny",
        "layer_step": "targets (GPU), v3, v32, tiny (CPU)",
        "sparse_decode": "targets, quick (GPU), off_table, prefill, results, layers, xla, "
        "cpu (CPU), tiny",
        "sparse_prefill": "targets, quick (GPU), off_table, xla, cpu (CPU), tiny",
    }


def test_the_peers_are_in_the_wheel():
    assert peers.FILE.name in {file.name for file in importlib.metadata.files("jax_flashmla")}


def test_limit_model_is_the_recorded_one():
    """Our limits are those beside the peers' numbers, up to their rounding."""
    recorded = peers.document()["rows"]
    ceilings = peers.document()["ceilings"]
    assert (H200.read_gbs, H200.tflops) == (
        ceilings["read_gbs"], ceilings["wgmma_sustained_tflops"],
    )  # fmt: skip
    assert len(peers.recorded()) == len(recorded) > 70
    for entry, shape in zip(recorded, GRIDS["targets"].shapes(), strict=True):
        assert (entry["b"], entry["h_q"], entry["s_k"]) == (shape.b, shape.h_q, shape.s_k)
        assert shape.cached_tokens == pytest.approx(entry["cached_tokens"], rel=1e-3)
        limit_us = H200.us(shape)
        assert limit_us == pytest.approx(entry["limit_us"], abs=0.06 + 1e-3 * limit_us)


@pytest.mark.parametrize(
    ("platform", "kind", "expected"),
    [
        ("gpu", "NVIDIA H200", (4580, 860, 5)),
        ("gpu", "NVIDIA H100 80GB HBM3", (3000, 860, 5)),
        ("gpu", "NVIDIA H100 PCIe", (3000, 650, 5)),
        ("gpu", "NVIDIA GH200 480GB", (3000, 650, 5)),
        ("cpu", "cpu", (3000, 650, 0)),
    ],
)
def test_limits_follow_the_device(platform, kind, expected):
    limits = limits_of(platform, kind, CEILINGS)
    assert (limits.read_gbs, limits.tflops, limits.overhead_us) == expected
    assert ("recorded" in limits.read_source) == (kind == "NVIDIA H200")


def test_peers_are_compared_with_their_like_only():
    shape = GRIDS["targets"].shapes()[0]
    like = {"device_kind": "NVIDIA H200", "dtype": "bfloat16", "block_size": 64}
    assert peers.comparable(shape, **like) == peers.recorded()[shape]
    other = {"device_kind": "NVIDIA GH200 480GB", "dtype": "float16", "block_size": 32}
    for name, value in other.items():
        assert peers.comparable(shape, **{**like, name: value}) == {}
    assert peers.comparable(Shape(1, 1, 20, 512), **like) == {}


@pytest.mark.parametrize("name", sorted(GRIDS))
def test_shapes_of_a_grid_are_distinct_and_fit_an_h100(name):
    found = GRIDS[name].shapes()
    assert len(found) == len(set(found)) > 0
    for shape in found:
        seqlens = shape.seqlens()
        assert seqlens.shape == (shape.b,)
        assert seqlens.min() >= 1
        setup = Setup(None, METHODS["gpu"], H200, "bfloat16", 64, False)
        assert calls.memory(shape, setup) < 70e9


def test_off_table_is_wide():
    found = GRIDS["off_table"].shapes()
    assert {shape.h_q for shape in found} >= {8, 20, 32, 40, 64, 96}
    assert (min(shape.s_q for shape in found), max(shape.s_q for shape in found)) == (1, 8)
    assert (min(shape.b for shape in found), max(shape.b for shape in found)) == (1, 512)
    assert (min(shape.s_k for shape in found), max(shape.s_k for shape in found)) == (64, 262144)
    assert {shape.lengths for shape in found} == {"equal", "normal", "skewed"}
    assert not set(found) & set(GRIDS["targets"].shapes())


def test_summary_by_group():
    limits = Limits(1000.0, "", 1e9, "", 0.0)  # bytes alone

    def result(shape, speedup):
        return {
            "b": shape.b, "s_q": 1, "h_q": shape.h_q, "s_k": shape.s_k, "lengths": "equal",
            "format": "dense", "limit_us": limits.us(shape), "speedup_vs_peers": speedup,
            "us": 2.0, "us_min": 1.9, "us_max": 2.1,
        }  # fmt: skip

    few, short, large = Shape(4, 1, 16, 99999), Shape(5, 1, 16, 999), Shape(128, 1, 16, 9999)
    measured = [result(few, 4.0), result(short, 2.0), result(large, 1.0), result(large, 0.25)]
    found = summary.summarise(OPERATION, [*measured, {"b": 1, "error": "OutOfMemory"}])
    assert (found["shapes"], found["failed"]) == (5, 1)
    groups = found["speedup_vs_peers"]
    assert {name: (entry["shapes"], entry["geometric_mean"]) for name, entry in groups.items()} == {
        "all": (4, pytest.approx(2**0.25)),
        "b <= 4": (1, 4),
        "b > 4, limit < 60 us": (1, 2),
        "b > 4, limit >= 60 us": (2, pytest.approx(0.5)),
    }
    assert groups["all"]["least"] == 0.25
    assert groups["all"]["least_at"]["b"] == 128
    assert "limit_fraction" not in found


@pytest.mark.parametrize(
    ("listing", "expected"),
    [
        # As XLA's SequentialThunk::ToString writes it: number, kind, a tab, what the kind adds.
        ("001: kCustomCall   \t\n002: kKernel\t, kernel = x\n", (0, 0, 1)),
        (
            "008: kKernel       \t, kernel = wrapped_add\n"
            "009: kCommandBuffer\t\n"
            "  001: kCustomCall\t\n"
            "  002: kCustomCall\t\n"
            "\n"
            "004: kCustomCall   \t\n"
            "010: kCommandBuffer\t\n"
            "  005: kCustomCall\t\n",
            (2, 3, 1),
        ),
        (
            "001: kWhile\t\n  condition:\n    002: kKernel\t\n  body:\n"
            "    003: kCommandBuffer\t\n      004: kCustomCall\t\n    005: kCustomCall\t\n",
            (1, 1, 1),
        ),
    ],
)
def test_custom_calls_in_command_buffers_are_counted(listing, expected):
    found = command_buffers.parse_thunks(listing)
    assert (found.command_buffers, found.calls_inside, found.calls_outside) == expected


def test_native_shapes_are_the_grid():
    script = ROOT / "benchmarks" / "native" / "shapes.py"
    command = [sys.executable, "-P", str(script), "targets", "--rows", "lengths=normal,b=8"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = [line.split() for line in done.stdout.splitlines()]
    expected = [
        shape for shape in GRIDS["targets"].shapes() if (shape.lengths, shape.b) == ("normal", 8)
    ]
    assert len(lines) == len(expected) > 1
    for (_, s_q, h_q, h_kv, num_parts, tile_rows, best_us, _, *lengths), shape in zip(
        lines, expected, strict=True
    ):
        assert (int(s_q), int(h_q), h_kv) == (shape.s_q, shape.h_q, "1")
        assert int(tile_rows) in (16, 64)
        assert 0 < int(num_parts) * math.ceil(int(s_q) * int(h_q) / 64) <= 132
        assert list(map(int, lengths)) == shape.seqlens().tolist()
        assert float(best_us) == peers.recorded()[shape]["best_us"]
