"""benchmarks/make_results.py: every grid's file, one after the other."""

from __future__ import annotations

import importlib.util
import pathlib

import pytest

from jax_flashmla.bench.operations import OPERATIONS

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def script():
    path = ROOT / "benchmarks" / "make_results.py"
    spec = importlib.util.spec_from_file_location("make_results", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_grids_are_there_and_gone_on_with(script, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(script, "run", lambda options, console: asked.append(options) or 0)
    assert script.main([str(tmp_path / "h100"), "--peers", "--commit", "abc"]) == 0
    assert [options.json for options in asked] == [
        tmp_path / "h100" / f"{name}.json" for name in script.GRIDS
    ]
    for options in asked:
        operation = OPERATIONS[options.operation]
        assert options.grid in operation.grids
        assert options.resume
        assert options.commit == "abc"
        assert options.peers == (options.operation != "layer_step")


@pytest.mark.parametrize(
    ("statuses", "made", "worst"), [([1, 0], 2, 1), ([0, 2], 2, 2), ([130], 1, 130)]
)
def test_a_failed_grid_costs_no_other_but_an_interrupt_ends_it(
    script, tmp_path, monkeypatch, statuses, made, worst
):
    left = list(statuses)
    monkeypatch.setattr(script, "run", lambda options, console: left.pop(0))
    assert script.main([str(tmp_path), "--only", "dense_bf16", "layer_step"]) == worst
    assert len(statuses) - len(left) == made
