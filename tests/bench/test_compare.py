"""Two results of the benchmark held against each other: what is a regression, and what is noise."""

from __future__ import annotations

import copy
import json
import pathlib

import pytest

from jax_flashmla.bench import document
from jax_flashmla.bench.compare import compare
from jax_flashmla.cli import main

TARGETS = pathlib.Path(__file__).parents[2] / "benchmarks" / "results" / "h200" / "targets.json"


@pytest.fixture
def old() -> dict:
    return document.read(TARGETS)


def slowed(old: dict, factor: float, *, first: int = 1, samples: float | None = None) -> dict:
    """The results with the first shapes' times multiplied, and their fastest sample once more."""
    new = copy.deepcopy(old)
    for result in new["shapes"][:first]:
        for name in ("us", "us_min", "us_max"):
            result[name] *= factor
        if samples is not None:
            result["us_min"] *= samples
    return new


def test_the_same_results_have_no_regression(old):
    comparison = compare(old, old)
    assert comparison.regressions == 0
    assert [change.ratio for change in comparison.changes] == [1.0] * 80
    assert not comparison.differences


@pytest.mark.parametrize(
    ("factor", "samples", "verdict"),
    [
        (1.2, None, "slower"),
        (0.8, None, "faster"),
        (1.02, None, ""),  # within the tolerance
        (1.2, 0.8, ""),  # a sample as fast as before
    ],
)
def test_regressions_are_told_from_noise(old, factor, samples, verdict):
    comparison = compare(old, slowed(old, factor, first=3, samples=samples))
    assert [change.verdict for change in comparison.changes[:4]] == [verdict] * 3 + [""]
    assert comparison.regressions == (3 if verdict == "slower" else 0)


def test_failures_and_missing_shapes_are_regressions(old):
    new = copy.deepcopy(old)
    for name in ("us", "us_min", "us_max"):
        del new["shapes"][0][name]
    new["shapes"][0]["error"] = "out of memory"
    del new["shapes"][5:7]
    assert compare(old, new).regressions == 3
    text = "\n".join(compare(old, new).lines())
    assert "0 slower, 0 faster, 1 failed, 0 repaired, 2 missing" in text
    # What failed before and what was not measured before are no regressions.
    assert compare(new, old).regressions == 0
    assert compare(new, new).regressions == 0


def test_other_hardware_and_ceilings_are_named(old):
    new = copy.deepcopy(old)
    new["hardware"]["device"] = "NVIDIA H100"
    new["ceilings"]["read_gbs"] *= 0.7
    differences = compare(old, new).differences
    assert "device: NVIDIA H200 before, NVIDIA H100 now" in differences
    assert "XLA itself reaches 0.70 times the read_gbs of before" in differences


def test_the_command_says_it_by_its_status(old, tmp_path, capsys):
    new = tmp_path / "new.json"
    new.write_text(json.dumps(slowed(old, 1.2)))
    assert main(["bench", "--compare", str(TARGETS), str(TARGETS)]) == 0
    assert main(["bench", "--compare", str(TARGETS), str(new)]) == 1
    assert "1 slower, 0 faster" in capsys.readouterr().out
    assert main(["bench", "--compare", str(TARGETS), str(new), "--tolerance", "0.5"]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--grid", "quick"], "--compare measures nothing"),
        (["--tolerance", "-1"], "--tolerance must be a fraction of at least 0, got -1.0"),
    ],
)
def test_bad_comparisons_are_named(options, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "--compare", str(TARGETS), str(TARGETS), *options])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_results_without_a_common_shape_are_refused(old):
    new = copy.deepcopy(old)
    new["shapes"] = []
    with pytest.raises(ValueError, match="no shape in common"):
        compare(old, new)
