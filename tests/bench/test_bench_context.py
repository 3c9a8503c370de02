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
    assert capsys.readouterr().out.count("times one device") == 5
    found = json.loads(file.read_text())
    assert found["commit"] == "abc"
    ways = [(x["devices"], x["heads_split"], x["peers"]) for x in found["shapes"]]
    assert ways[:3] == [(1, True, False), (2, False, False), (2, True, False)]
    assert ways[3:] == [(2, False, True), (2, True, True)]
    assert all((x["tokens"], x["h_q"]) == (70, 4) for x in found["shapes"])
    assert all(0 < x["us_min"] <= x["us"] <= x["us_max"] for x in found["shapes"])
