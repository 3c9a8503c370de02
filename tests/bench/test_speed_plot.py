"""README's picture: its bars are the recorded times."""

from __future__ import annotations

import importlib.util
import json
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("speed_plot", ROOT / "scripts" / "speed_plot.py")
speed_plot = importlib.util.module_from_spec(spec)
spec.loader.exec_module(speed_plot)


@pytest.fixture(scope="module")
def document():
    return json.loads((speed_plot.RESULTS / "targets.json").read_text())


def test_every_shape_has_all_alternatives(document):
    for result in speed_plot.shapes(document):
        assert speed_plot.times(result).keys() == speed_plot.BARS.keys()


def test_bars_are_the_recorded_times(document):
    figure = speed_plot.draw(document)
    (axes,) = figure.axes
    drawn = [round(bar.get_height(), 9) for bar in axes.patches]
    times = [speed_plot.times(result) for result in speed_plot.shapes(document)]
    expected = [
        round(found[label] / found["jax_flashmla"], 9)
        for found in times
        for label in speed_plot.BARS
    ]
    assert drawn == expected
    written = [text.get_text() for text in axes.texts]
    assert written[0] == f"{times[0]['jax_flashmla']:.0f}"
    assert (ROOT / "benchmarks/results/h200/speed.png").stat().st_size > 10_000
