"""benchmarks/bench_context.py at a tiny size."""

import json
import pathlib
import runpy

import pytest

SCRIPT = pathlib.Path(__file__).parents[2] / "benchmarks" / "bench_context.py"


@pytest.mark.usefixtures("on_cpu")
def test_shapes_are_timed_and_recorded(tmp_path, capsys):
    main = runpy.run_path(str(SCRIPT))["main"]
    file = tmp_path / "context.json"
    sizes = "--platform cpu --devices 1 2 --tokens 70 --heads 4 --calls 2 --commit abc"
    assert main([*sizes.split(), "--json", str(file)]) == 0
    assert capsys.readouterr().out.count("times one device") == 3
    found = json.loads(file.read_text())
    assert found["commit"] == "abc"
    shapes = [(x["devices"], x["heads_split"], x["tokens"], x["h_q"]) for x in found["shapes"]]
    assert shapes == [(1, True, 70, 4), (2, False, 70, 4), (2, True, 70, 4)]
    assert all(0 < x["us_min"] <= x["us"] <= x["us_max"] for x in found["shapes"])
