"""The benchmark on the CPU: tiny shapes through all of its code."""

import importlib.util
import json
import pathlib
import subprocess
import sys

import pytest

BENCHMARKS = pathlib.Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def shapes(monkeypatch):
    spec = importlib.util.spec_from_file_location("shapes", BENCHMARKS / "shapes.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "shapes", module)
    spec.loader.exec_module(module)
    return module


def run_benchmark(*options: str) -> subprocess.CompletedProcess[str]:
    script = str(BENCHMARKS / "bench_dense_decode.py")
    return subprocess.run([sys.executable, script, *options], capture_output=True, text=True)


def test_tiny_grid_is_measured_and_recorded(tmp_path):
    file = tmp_path / "results" / "tiny.json"
    done = run_benchmark(
        "--grid", "tiny", "--rows", "b=2", "--rows", "b=3,h_q=4", "--json", str(file)
    )
    assert done.returncode == 0, done.stderr
    assert "2 rows, 0 failed" in done.stdout
    document = json.loads(file.read_text())
    assert document["versions"]["jax"]
    assert document["date"]
    assert document["ceilings"]["read_gbs"] > 0
    assert [row["b"] for row in document["rows"]] == [2, 3]
    for row in document["rows"]:
        assert row["us_min"] <= row["us"] <= row["us_max"]
        assert row["relative_error"] < 1e-2
        assert row["speedup_vs_reference"] == pytest.approx(row["reference_us"] / row["us"])


def test_bad_conditions_are_named():
    assert "field=value" in run_benchmark("--grid", "tiny", "--rows", "heads=3").stderr
    assert "no row of grid" in run_benchmark("--grid", "tiny", "--rows", "b=77").stderr


def test_limit_model_is_the_recorded_one(shapes):
    """Our limits are those beside the peers' numbers, up to their rounding."""
    document = json.loads(shapes.PEERS_FILE.read_text())
    assert len(shapes.peers()) == len(document["rows"]) > 70
    for recorded, row in zip(document["rows"], shapes.grid("targets"), strict=True):
        assert (recorded["b"], recorded["h_q"], recorded["s_k"]) == (row.b, row.h_q, row.s_k)
        assert row.cached_tokens == pytest.approx(recorded["cached_tokens"], rel=1e-3)
        assert row.limit_us() == pytest.approx(
            recorded["limit_us"], abs=0.06 + 1e-3 * row.limit_us()
        )


def test_every_grid_has_distinct_rows(shapes):
    for name in shapes.GRIDS:
        rows = shapes.grid(name)
        assert len(rows) == len(set(rows)) > 0, name
        for row in rows:
            seqlens = row.seqlens()
            assert seqlens.shape == (row.b,)
            assert seqlens.min() >= 1
