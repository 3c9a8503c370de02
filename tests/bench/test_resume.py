"""`bench --resume`: what an earlier run measured is not measured again."""

from __future__ import annotations

import json

import pytest

from jax_flashmla.bench import document, run
from jax_flashmla.bench.measure import Ceilings
from jax_flashmla.cli import main

pytestmark = pytest.mark.usefixtures("on_cpu")
GRID = ("--grid", "tiny", "--xla", "none", "--commit", "abc")


@pytest.fixture
def measured(monkeypatch):
    """The b of each shape that is measured, and what that of 3 raises, the first time."""
    ceilings = Ceilings(3000.0, 2800.0, 650.0, 8192, "bfloat16")
    monkeypatch.setattr(run, "measure_ceilings", lambda device, method: ceilings)
    monkeypatch.setattr(run, "compile_shapes", lambda lower, **_: [{} for _ in lower])
    found: list[int] = []
    raised: list[BaseException] = []
    numbers = ("us", "us_min", "us_max", "limit_us", "limit_fraction", "tflops", "gbs")

    def measure_shape(operation, shape, *arguments, **options):
        found.append(shape.b)
        if shape.b == 3 and raised:
            raise raised.pop()
        return dict.fromkeys(numbers, 1.0)

    monkeypatch.setattr(run, "measure_shape", measure_shape)
    return found, raised


def bench(file, *options: str) -> int:
    return main(["bench", *GRID, "--json", str(file), *options])


@pytest.mark.parametrize(
    ("error", "status", "kept"), [(KeyboardInterrupt(), 130, [2]), (ValueError("x"), 1, [2, 4])]
)
def test_what_is_missing_or_failed_is_measured(tmp_path, measured, error, status, kept, capsys):
    found, raised = measured
    raised.append(error)
    file = tmp_path / "tiny.json"
    assert bench(file, "--resume") == status  # there is nothing to go on with
    before = document.read(file)
    assert [s["b"] for s in before["shapes"] if "error" not in s] == kept
    capsys.readouterr()
    found.clear()
    assert bench(file, "--resume") == 0
    assert found == [b for b in (2, 3, 4) if b not in kept]
    after = document.read(file)
    assert [s["b"] for s in after["shapes"]] == [2, 3, 4]
    assert not after["interrupted"]
    names = ("date", "hardware", "ceilings", "limits")
    assert after["resumed"] == [{name: before[name] for name in names}]
    assert "3 shapes, 0 failed" in capsys.readouterr().out
    found.clear()
    assert bench(file, "--resume") == 0  # nothing is left
    assert found == []
    assert [s["b"] for s in document.read(file)["shapes"]] == [2, 3, 4]
    assert bench(file) == 0  # all again
    assert found == [2, 3, 4]
    assert "resumed" not in document.read(file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"commit": "abd"}, "must be of the same commit, got abd there and abc now"),
        ({"grid": "quick"}, "must be of the same grid, got quick there and tiny now"),
        ({"operation": "index_topk"}, "must be of the same operation, got index_topk there"),
        ({"hardware": {"device": "other"}}, "must be of the same device, got other there"),
        ({"method": {"samples": 3}}, "must be of the same method"),
    ],
)
def test_another_run_s_file_is_refused_and_left(tmp_path, measured, change, message, capsys):
    file = tmp_path / "tiny.json"
    assert bench(file) == 0
    text = json.dumps({**json.loads(file.read_text()), **change, "shapes": []})
    file.write_text(text)
    capsys.readouterr()
    assert bench(file, "--resume") == 2
    assert message in " ".join(capsys.readouterr().out.split())
    assert file.read_text() == text


def test_it_needs_a_file(capsys):
    with pytest.raises(SystemExit):
        main(["bench", *GRID, "--resume"])
    assert "--resume needs --json" in capsys.readouterr().err
