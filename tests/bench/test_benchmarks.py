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

from jax_flashmla import kernel_refusal
from jax_flashmla.cli import main
from jax_flashmla.cli.bench import command_buffers, document, measure, peers, rows, run, summary
from jax_flashmla.cli.bench.decode_calls import make_pool, make_q, make_tables, package_decode
from jax_flashmla.cli.bench.grids import GRIDS
from jax_flashmla.cli.bench.limits import Limits, h200_limits, limits_of
from jax_flashmla.cli.bench.measure import METHODS, Ceilings, time_calls
from jax_flashmla.cli.bench.options import BLOCK_SIZES
from jax_flashmla.cli.bench.rows import Setup
from jax_flashmla.cli.bench.shapes import Row
from jax_flashmla.cli.device import count_decode_calls

ROOT = pathlib.Path(__file__).parents[2]
CEILINGS = Ceilings(3000.0, 2800.0, 650.0, 8192, "bfloat16")


@pytest.fixture
def quick_ceilings(monkeypatch):
    """The ceilings are measured in the test that looks at them."""
    monkeypatch.setattr(run, "measure_ceilings", lambda device, method: CEILINGS)


@pytest.mark.parametrize(
    ("warm_seconds", "lead_seconds", "runs_a_sample"),
    [(0.0, 0.0, 1), (1e-12, 0.0, 2), (1e-12, 1e-12, 4)],
)
def test_a_sample_is_warmed_up_untimed_if_the_method_says_so(
    warm_seconds, lead_seconds, runs_a_sample
):
    runs = []
    method = dataclasses.replace(
        METHODS["cpu"], samples=5, warm_seconds=warm_seconds, lead_seconds=lead_seconds
    )
    timing = time_calls(lambda: runs.append(None), 1, method)
    assert len(runs) == 3 + (5 + 1) * runs_a_sample  # five samples, one under lasting load
    assert timing.us_min <= timing.us <= timing.us_max


@pytest.mark.parametrize(
    ("cache_bytes", "limit_us", "caches", "rounds"),
    [
        (10**9, 250.0, 8, 1),  # long calls
        (18_900_000, 9.2, 14, 4),  # fourteen of these take less than half a millisecond
        (590_000, 5.1, 128, 1),  # no more than max_calls
        (4_000_000, 6.0, 64, 2),
    ],
)
def test_short_calls_read_their_caches_several_times(cache_bytes, limit_us, caches, rounds):
    method = METHODS["gpu"]
    assert method.caches(cache_bytes) == caches
    assert method.rounds(caches, limit_us) == rounds


@pytest.mark.usefixtures("on_cpu")
def test_xla_keeps_calls_over_the_same_cache_apart():
    row = Row(2, 1, 4, 96)
    device = jax.devices("cpu")[0]
    tables = make_tables(row, 1, 16) * 3
    pool = make_pool(row.num_blocks(16), 16, "bfloat16", device)
    arguments = (make_q(row, "bfloat16", device), pool, tables, row.seqlens())
    decode = package_decode(row, "kernel")
    assert count_decode_calls(decode.lower(*arguments).compile()) == 3


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
    refusals = [kernel_refusal("cuda", block_size=size) for size in BLOCK_SIZES]
    assert not any("block_size" in refusal for refusal in refusals if refusal)


def bench(*options: str) -> int:
    return main(["bench", *options])


@pytest.mark.usefixtures("on_cpu")
def test_tiny_grid_is_measured_recorded_drawn_and_shown_again(tmp_path, capsys):
    file, plots = tmp_path / "results" / "tiny.json", tmp_path / "plots"
    assert bench("--grid", "tiny", "--rows", "b=2", "--rows", "b=3,h_q=4", "--json", str(file)) == 0
    measured = capsys.readouterr().out
    assert "2 rows, 0 failed" in measured
    assert not plots.exists()

    found = json.loads(file.read_text())
    assert set(document.FIELDS) == set(found) - {"xla_flags"}
    assert found["versions"]["jax"]
    assert found["ceilings"]["read_gbs"] > 0
    assert found["limits"]["read_gbs"] == max(
        found["ceilings"]["read_gbs"], found["ceilings"]["copy_gbs"]
    )
    assert [row["b"] for row in found["rows"]] == [2, 3]
    for row in found["rows"]:
        assert row["us_min"] <= row["us"] <= row["us_max"]
        assert row["relative_error"] < 1e-2
        for baseline in ("reference", "xla"):
            speedup = row[f"{baseline}_us"] / row["us"]
            assert row[f"speedup_vs_{baseline}"] == pytest.approx(speedup)
        assert row["limit_fraction"] == pytest.approx(row["limit_us"] / row["us"])
        assert "peers" not in row

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
    for row in found["rows"]:
        assert row["calls"] == row["decode_custom_calls"] == 3
        assert row["command_buffers"] is None  # a GPU's
        assert "xla_us" not in row


@pytest.mark.usefixtures("on_cpu", "quick_ceilings")
def test_one_row_that_fails_costs_no_other(tmp_path, capsys, monkeypatch):
    real = rows.relative_error
    monkeypatch.setattr(
        rows, "relative_error", lambda *x: float("nan") if x[-1].b == 3 else real(*x)
    )
    file = tmp_path / "tiny.json"
    assert bench("--grid", "tiny", "--xla", "none", "--json", str(file)) == 1
    assert "3 rows, 1 failed" in capsys.readouterr().out
    errors = [row.get("error") for row in document.read(file)["rows"]]
    assert errors == [None, "AssertionError: wrong result: relative error nan", None]


@pytest.mark.usefixtures("on_cpu", "quick_ceilings")
def test_interrupt_keeps_what_was_measured(tmp_path, capsys, monkeypatch):
    real = run.measure_row

    def interrupted(row, *arguments, **options):
        if row.b == 3:
            assert document.read(file)["interrupted"], "a killed run would not say that it was"
            raise KeyboardInterrupt
        return real(row, *arguments, **options)

    file = tmp_path / "tiny.json"
    monkeypatch.setattr(run, "measure_row", interrupted)
    assert bench("--grid", "tiny", "--xla", "none", "--json", str(file)) == 130
    assert "1 rows, 0 failed" in capsys.readouterr().out
    found = document.read(file)
    assert found["interrupted"]
    assert [row["b"] for row in found["rows"]] == [2]


@pytest.mark.usefixtures("on_cpu")
def test_no_row_is_left(capsys):
    assert bench("--grid", "tiny", "--rows", "b=77") == 2
    assert "no row of grid 'tiny' meets --rows b=77" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rows", "heads=3"], "field=value with field in b, s_q, h_q, s_k, lengths"),
        (["--rows", "b"], "got 'b'"),
        (["--layers", "0"], "layers must be at least 1, got 0"),
        (["--block-size", "48"], "invalid choice"),
        (["--grid", "all"], "invalid choice"),
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


def test_the_peers_are_in_the_wheel():
    assert peers.FILE.name in {file.name for file in importlib.metadata.files("jax_flashmla")}


def test_limit_model_is_the_recorded_one():
    """Our limits are those beside the peers' numbers, up to their rounding."""
    recorded = peers.document()["rows"]
    assert len(peers.recorded()) == len(recorded) > 70
    for entry, row in zip(recorded, GRIDS["targets"](), strict=True):
        assert (entry["b"], entry["h_q"], entry["s_k"]) == (row.b, row.h_q, row.s_k)
        assert row.cached_tokens == pytest.approx(entry["cached_tokens"], rel=1e-3)
        limit_us = h200_limits().us(row)
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
    row = GRIDS["targets"]()[0]
    like = {"device_kind": "NVIDIA H200", "dtype": "bfloat16", "block_size": 64}
    assert peers.comparable(row, **like) == peers.recorded()[row]
    other = {"device_kind": "NVIDIA GH200 480GB", "dtype": "float16", "block_size": 32}
    for name, value in other.items():
        assert peers.comparable(row, **{**like, name: value}) == {}
    assert peers.comparable(Row(1, 1, 20, 512), **like) == {}


@pytest.mark.parametrize("name", sorted(GRIDS))
def test_rows_of_a_grid_are_distinct_and_fit_an_h100(name):
    found = GRIDS[name]()
    assert len(found) == len(set(found)) > 0
    for row in found:
        seqlens = row.seqlens()
        assert seqlens.shape == (row.b,)
        assert seqlens.min() >= 1
        setup = Setup(None, METHODS["gpu"], h200_limits(), "bfloat16", 64, False)
        assert setup.memory(row) < 70e9


def test_off_table_is_wide():
    found = GRIDS["off_table"]()
    assert {row.h_q for row in found} >= {8, 20, 32, 40, 64, 96}
    assert (min(row.s_q for row in found), max(row.s_q for row in found)) == (1, 8)
    assert (min(row.b for row in found), max(row.b for row in found)) == (1, 512)
    assert (min(row.s_k for row in found), max(row.s_k for row in found)) == (64, 262144)
    assert {row.lengths for row in found} == {"equal", "normal", "skewed"}
    assert not set(found) & set(GRIDS["targets"]())


def test_summary_by_group():
    limits = Limits(1000.0, "", 1e9, "", 0.0)  # bytes alone

    def result(row, speedup):
        return {
            "b": row.b, "s_q": 1, "h_q": row.h_q, "s_k": row.s_k, "lengths": "equal",
            "limit_us": limits.us(row), "speedup_vs_peers": speedup,
        }  # fmt: skip

    few, short, large = Row(4, 1, 16, 99999), Row(5, 1, 16, 999), Row(128, 1, 16, 9999)
    measured = [result(few, 4.0), result(short, 2.0), result(large, 1.0), result(large, 0.25)]
    found = summary.summarise([*measured, {"b": 1, "error": "OutOfMemory"}])
    assert (found["rows"], found["failed"]) == (5, 1)
    groups = found["speedup_vs_peers"]
    assert {name: (entry["rows"], entry["geometric_mean"]) for name, entry in groups.items()} == {
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


def test_native_rows_are_the_grid():
    script = ROOT / "benchmarks" / "native" / "rows.py"
    command = [sys.executable, "-P", str(script), "targets", "--rows", "lengths=normal,b=8"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = [line.split() for line in done.stdout.splitlines()]
    expected = [row for row in GRIDS["targets"]() if (row.lengths, row.b) == ("normal", 8)]
    assert len(lines) == len(expected) > 1
    for (_, s_q, h_q, h_kv, num_parts, best_us, _, *lengths), row in zip(
        lines, expected, strict=True
    ):
        assert (int(s_q), int(h_q), h_kv) == (row.s_q, row.h_q, "1")
        assert 0 < int(num_parts) * math.ceil(int(s_q) * int(h_q) / 64) <= 132
        assert list(map(int, lengths)) == row.seqlens().tolist()
        assert float(best_us) == peers.recorded()[row]["best_us"]
