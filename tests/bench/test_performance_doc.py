"""docs/performance.md is what scripts/performance_doc.py makes of the committed results."""

import copy
import importlib.util
import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "performance_doc.py"
RESULTS = ROOT / "benchmarks" / "results"


def load_script():
    spec = importlib.util.spec_from_file_location("performance_doc", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


performance_doc = load_script()
PAGE = performance_doc.PAGE.read_text()


def test_the_page_is_what_the_script_makes():
    assert performance_doc.rewrite(PAGE, RESULTS) == PAGE
    assert subprocess.run([sys.executable, str(SCRIPT), "--check"]).returncode == 0


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*/*.json")), ids=lambda path: path.name)
def test_no_results_are_left_out(path):
    card = path.parent.name
    assert f"<!-- table: runs {card} -->" in PAGE
    assert f" {card}/{path.name} -->" in PAGE


@pytest.fixture
def targets():
    return json.loads((RESULTS / "h200" / "targets.json").read_text())


def rewritten(document, tmp_path, kind):
    (tmp_path / "new.json").write_text(json.dumps(document))
    page = f"before\n<!-- table: {kind} new.json -->\nold\n<!-- end -->\nafter\n"
    return performance_doc.rewrite(page, tmp_path)


def test_a_changed_time_changes_the_page(targets, tmp_path):
    document = copy.deepcopy(targets)
    result = performance_doc.results_of(document)[0]
    result["us"] = 1234.5
    page = rewritten(document, tmp_path, "shapes")
    assert page != rewritten(targets, tmp_path, "shapes")
    assert "| 1,234 |" in page
    assert "old" not in page
    assert page.startswith("before\n")
    assert page.endswith("<!-- end -->\nafter\n")


def test_shapes_that_failed_or_beat_the_limit_are_marked(targets, tmp_path):
    failed, fast = copy.deepcopy(performance_doc.results_of(targets)[:2])
    shape = {name: failed[name] for name in ("b", "s_q", "h_q", "s_k", "lengths")}
    fast["limit_fraction"] = 1.25
    document = {"shapes": [shape | {"error": "out of memory"}, fast]}
    lines = rewritten(document, tmp_path, "shapes").splitlines()
    (failed_line,) = [line for line in lines if "failed" in line]
    (fast_line,) = [line for line in lines if "(exceeded)" in line]
    assert failed_line.startswith("| 1 | 1 | 16 | 512 | equal | failed |")
    assert "1.25 (exceeded)" in fast_line
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1


def test_columns_that_no_shape_fills_are_left_out(targets, tmp_path):
    document = copy.deepcopy(targets)
    assert "plain XLA" in rewritten(document, tmp_path, "shapes")
    for result in performance_doc.results_of(document):
        result.pop("xla_us", None)
        result.pop("speedup_vs_xla", None)
    assert "XLA" not in rewritten(document, tmp_path, "shapes")


def test_sparse_shapes_have_their_own_columns(tmp_path):
    numbers = {
        "us": 81.5, "us_min": 80.0, "us_max": 83.0, "gbs": 2400.0, "tflops": 300.0,
        "limit_us": 73.4, "limit_fraction": 0.9, "live_peer_us": 163.0, "speedup_vs_live_peer": 2.0,
    }  # fmt: skip
    shape = {"b": 64, "s_q": 1, "h_q": 64, "topk": 2048, "extra_topk": 0, "format": "v32"}
    document = {"shapes": [shape | {"s_k": 16384} | numbers]}
    page = rewritten(document, tmp_path, "shapes")
    header, _, line = [x for x in page.splitlines() if x.startswith("| ")]
    cells = dict(zip(header.split("|"), line.split("|"), strict=True))
    assert cells[" top k "] == " 2048 "
    assert cells[" format "] == " v32 "
    assert (cells[" peer in this run "], cells[" times that "]) == (" 163 ", " 2.00 ")
    assert not {" lengths ", " of an extra cache "} & set(cells)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, ""),
        (6.282, "6.28"),
        (14.92, "14.9"),
        (221.3, "221"),
        (1691.5, "1,692"),
        (0.5, "0.50"),
    ],
)
def test_numbers_have_three_digits(value, text):
    assert performance_doc.number(value) == text


def test_a_table_of_no_known_kind_is_refused(targets, tmp_path):
    with pytest.raises(ValueError, match="a table is runs, card, compact, summary, shapes, step; got 'shape'"):
        rewritten(targets, tmp_path, "shape")
