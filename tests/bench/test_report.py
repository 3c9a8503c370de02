"""What the benchmark says of its numbers: units, spread, limits that were exceeded, plots."""

from __future__ import annotations

import pathlib

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console

from jax_flashmla.bench import document, report, summary, units
from jax_flashmla.bench.dense_decode import OPERATION
from jax_flashmla.bench.roofline_plot import draw_roofline
from jax_flashmla.bench.time_plot import draw_times
from jax_flashmla.cli import main

H200 = pathlib.Path(__file__).parents[2] / "benchmarks" / "results" / "h200"
LIMITS = {"read_gbs": 40.6, "read_source": "x", "tflops": 0.153, "tflops_source": "y"}


def result(us: float = 2000.0, fastest: float = 1900.0, slowest: float = 2100.0, **changes):
    return {
        "b": 4, "s_q": 1, "h_q": 16, "s_k": 1024, "lengths": "equal", "format": "dense",
        "cached_tokens": 4096,
        "us": us, "us_min": fastest, "us_max": slowest, "tflops": 0.003, "gbs": 0.4,
        "limit_us": 900.0, "limit_fraction": 900.0 / us, **changes,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (4.58e12, "4.58 TB/s"),
        (4.1e8, "410 MB/s"),
        (1e9, "1 GB/s"),
        (999.0, "999 B/s"),
        (0.0, "0 B/s"),
        (2e-9, "0.002 uB/s"),
        (float("inf"), "inf B/s"),
    ],
)
def test_units_fit_the_number(value, text):
    assert units.with_unit(value, "B/s") == text


def test_a_line_has_its_spread_and_units_of_the_device():
    table = report.ShapeTable(OPERATION, LIMITS)
    cells = dict(zip(table.header().split()[:11], table.line(result()).split(), strict=False))
    assert (cells["GFLOP/s"], cells["GB/s"]) == ("3", "0.4")
    assert (cells["us"], cells["fastest"], cells["slowest"]) == ("2000.00", "1900.00", "2100.00")
    assert "!" not in table.line(result())


@pytest.mark.parametrize(
    ("changes", "remark"),
    [
        ({"slowest": 2500.0}, "! samples differ by 30%"),
        ({"limit_fraction": 1.64}, "! faster than its limit"),
        (
            {"slowest": 4000.0, "limit_fraction": 1.01},
            "! samples differ by 105%, faster than its limit",
        ),
    ],
)
def test_doubtful_numbers_are_flagged(changes, remark):
    assert report.ShapeTable(OPERATION, LIMITS).line(result(**changes)).endswith(remark)


def test_doubtful_numbers_are_counted_and_in_no_mean(capsys):
    found = summary.summarise(
        OPERATION, [result(), result(limit_fraction=1.64), result(slowest=9000.0)]
    )
    assert (found["limit_exceeded"], found["wide_spread"]) == (1, 1)
    assert found["limit_fraction"]["all"]["shapes"] == 2
    assert found["limit_fraction"]["all"]["geometric_mean"] == pytest.approx(0.45)
    report.print_summary(found, Console())
    said = capsys.readouterr().out
    assert "! samples of 1 shape differ by more than 25%" in said
    assert "! 1 shape faster than the limit model allows" in said


def test_results_of_before_there_were_operations_are_shown(capsys):
    assert main(["bench", "--from", str(H200 / "layers.json")]) == 0
    said = capsys.readouterr().out
    assert "8 shapes, 0 failed" in said
    assert "61 custom calls in the compiled module; inside" in said
    assert document.read(H200 / "targets.json")["operation"] == "dense_decode"


@pytest.mark.parametrize("option", ["--json", "--plots"])
def test_results_that_could_not_be_kept_are_refused_before_measuring(tmp_path, capsys, option):
    missing, file = tmp_path / "no" / "x.json", tmp_path / "file"
    file.write_text("")
    path = missing if option == "--json" else file
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "--grid", "tiny", option, str(path)])
    assert stopped.value.code == 2
    expected = f"no folder {missing.parent}" if option == "--json" else f"{file} is a file"
    assert expected in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [file]


def test_a_folder_is_no_file(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["bench", "--json", str(tmp_path)])
    assert "must be a file, it is a folder" in capsys.readouterr().err


def drawn(results, draw, *arguments):
    figure = Figure(layout="constrained")
    draw(figure, results, OPERATION.axes, *arguments)
    FigureCanvasAgg(figure).draw()
    return figure


@pytest.mark.parametrize(("us", "unit"), [(3.0, "us"), (2000.0, "ms"), (3e6, "s")])
def test_times_are_drawn_in_units_that_fit_with_a_legend_of_what_is_there(us, unit):
    figure = drawn([result(us, us, us), result(us, us, us, b=32)], draw_times)
    (ax,) = figure.axes
    assert ax.get_ylabel() == f"time of a call, {unit}"
    styles, series = ([t.get_text() for t in legend.get_texts()] for legend in figure.legends)
    assert series == ["32", "4"]
    assert styles == ["jax_flashmla, median (bar: fastest to slowest)", "limit model"]


RECORDED, LIVE = {"peers": {"best_us": 3000.0}}, {"live_peer_us": 4000.0}


@pytest.mark.parametrize(
    ("peers", "label", "drawn_us"),
    [
        ([RECORDED, {}], "best recorded peer", [3000]),
        ([LIVE, {}], "peer in the same run", [4000]),
        ([LIVE | RECORDED], "peer in the same run", [4000]),
        (
            [RECORDED, LIVE],
            "best recorded peer (some: in the same run)",
            [3000, 4000],
        ),
    ],
)
def test_peers_are_drawn_where_there_are_any(peers, label, drawn_us):
    results = [result(s_k=1024 << i, **peer) for i, peer in enumerate(peers)]
    figure = drawn(results, draw_times)
    assert [t.get_text() for t in figure.legends[0].get_texts()][2:] == [label]
    (crosses,) = [line for line in figure.axes[0].lines if line.get_marker() == "x"]
    assert list(crosses.get_ydata() * 1e3) == pytest.approx(drawn_us)


def test_rates_are_drawn_in_units_that_fit():
    (ax,) = drawn([result()], draw_roofline, LIMITS).axes
    assert ax.get_ylabel() == "GFLOP/s"
    assert {text.get_text() for text in ax.texts} == {"40.6 GB/s", "153 GFLOP/s"}


@pytest.mark.parametrize("name", ["targets", "off_table"])
def test_no_label_covers_another(name):
    results = document.read(H200 / f"{name}.json")["shapes"]
    for ax in (ax for ax in drawn(results, draw_times).axes if ax.get_visible()):
        for axis in (ax.xaxis, ax.yaxis):
            low, high = sorted(axis.get_view_interval())
            ticks = zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=False)  # none inside
            boxes = [text.get_window_extent() for at, text in ticks if low <= at <= high]
            boxes = [box for box in boxes if box.width > 0]
            assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
