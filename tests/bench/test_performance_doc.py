"""docs/performance.md is what scripts/performance_doc.py makes of the committed results."""

import copy
import importlib.util
import json
import pathlib
import subprocess
import sys

import pytest

from jax_flashmla.bench.operations import OPERATIONS
from jax_flashmla.bench.summary import summarise

ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "performance_doc.py"
RESULTS = ROOT / "benchmarks" / "results"


def load_script(name):
    spec = importlib.util.spec_from_file_location(name, SCRIPT.with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


performance_doc = load_script("performance_doc")
card_plot = load_script("card_plot")
PAGE = performance_doc.PAGE.read_text()


def test_the_page_is_what_the_script_makes():
    assert performance_doc.rewrite(PAGE, RESULTS) == PAGE
    assert subprocess.run([sys.executable, str(SCRIPT), "--check"]).returncode == 0


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*/*.json")), ids=lambda path: path.name)
def test_no_results_are_left_out(path):
    card = path.parent.name
    assert f"<!-- table: runs {card} -->" in PAGE
    of_card = f"<!-- table: card {card} -->" in PAGE
    assert f" {card}/{path.name} -->" in PAGE or (of_card and f"{card}/{path.name}): grid" in PAGE)


def test_readme_is_what_the_script_makes():
    page = (ROOT / "README.md").read_text()
    assert "<!-- table: compact h200 -->" in page
    assert performance_doc.rewrite(page, RESULTS) == page


@pytest.fixture
def card(tmp_path):
    """A folder of a card with one file of results and its plot."""
    fields = {"b": 64, "s_q": 1, "topk": 2048, "extra_topk": 0, "format": "v32", "s_k": 16384}
    numbers = {"us_min": 80.0, "us_max": 83.0, "gbs": 2400.0, "tflops": 300.0}
    numbers |= {"limit_us": 40.0, "limit_fraction": 0.5}
    shapes = [
        {**fields, **numbers, "h_q": 64, "us": 80.0, "speedup_vs_live_peer": 2.0, "peers": {}},
        {**fields, **numbers, "h_q": 16, "us": 50.0, "speedup_vs_live_peer": 4.5},
    ]
    for shape in shapes:
        shape |= {"query_tokens": 64, "gathered_tokens": 64 * 2048}
    document = {
        "hardware": {"device": "a card", "name": "a card"}, "commit": "0123456789", "grid": "some",
        "date": "2026-11-28T10:00:00", "operation": "sparse_decode", "interrupted": False,
        "ceilings": {"gather_gbs": {"656": 1000.0}}, "shapes": shapes,
        "limits": {"gather_gbs": {"656": 2600.0}, "gather_source": "a source"},
        "summary": summarise(OPERATIONS["sparse_decode"], shapes),
    }  # fmt: skip
    folder = tmp_path / "card"
    folder.mkdir()
    (folder / "sparse_decode.json").write_text(json.dumps(document))
    (folder / "other.json").write_text(json.dumps({"steps": []}))
    for name in ("sparse_decode.png", "operations.png"):
        (folder / name).touch()
    return folder


def test_a_card_s_page_says_all_of_its_files(card):
    page = performance_doc.card(card)
    assert "### Sparse decode" in page
    assert "(../benchmarks/results/card/sparse_decode.png)" in page
    assert "656 B 2.60 (XLA 1.00): a source" in page
    assert "Over the shape recorded of it before, 2.00 times" in page
    groups = [line for line in page.splitlines() if line.startswith("| all")]
    assert groups[0].startswith("| all | 3.00 | 2.00 | 2 | 0.50 |")
    lines = [line for line in page.splitlines() if line.startswith("| 64 | 1 ")]
    assert [line.split("|")[-2].strip() for line in lines] == ["", "1.60"]  # beside 64 heads


def test_a_compact_table_has_a_line_for_each_file(card):
    table = performance_doc.compact(card)
    assert table.startswith("![Speed against the peer in the same run](benchmarks/results/card/")
    first, *_ = [line for line in table.splitlines() if line.startswith("| Sparse")]
    cells = [cell.strip() for cell in first.strip("|").split("|")]
    peer = "FlashMLA's frozen Hopper kernel"
    assert cells == ["Sparse decode", "2", peer, "3.00 (least 2.00)", "0.50"]
    (card / "sparse_decode.json").rename(card / "sparse_decode_few.json")
    assert "| Sparse decode: few | 2 |" in performance_doc.compact(card)
    (card / "sparse_decode_few.json").unlink()
    assert performance_doc.compact(card) == ""


def test_a_card_s_plot_has_each_shape_and_the_means(card):
    (axes,) = card_plot.draw(card).axes
    dots = [line.get_xdata() for line in axes.lines if line.get_marker() == "o"]
    assert [sorted(x) for x in dots] == [[2.0, 4.5], [4.5], [2.0]]
    assert [text.get_text() for text in axes.texts] == ["3.00", "4.50", "2.00"]


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
    assert (cells[" peer in this run, us "], cells[" times this peer "]) == (" 163 ", " 2.00 ")
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
    with pytest.raises(
        ValueError, match="a table is runs, card, compact, summary, shapes, step; got 'shape'"
    ):
        rewritten(targets, tmp_path, "shape")
