"""A roofline: the rate of arithmetic against operations per byte, under the device's ceilings."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from jax_flashmla.bench.operation import Axes
from jax_flashmla.bench.shape import Result
from jax_flashmla.bench.time_plot import COLOURS, LIGHTEST
from jax_flashmla.bench.units import scale_for, with_unit

MARKERS = "osD^vP*Xdhp8"  # colour alone would not tell them apart


def draw_roofline(
    figure: Figure, results: list[Result], axes: Axes, limits: dict[str, Any]
) -> None:
    """Draws onto the figure.

    Args:
        figure: an empty one.
        results: measured shapes. A point's shape and colour say its axes.kind, its area the
            logarithm of its axes.size.
        axes: the operation's.
        limits: of the document: the two ceilings and where they come from.
    """
    figure.set_size_inches(9, 6)
    ax = figure.subplots()
    scale, unit = scale_for([limits["tflops"] * 1e12], "FLOP/s")
    tera = 1e12 / scale  # what a TFLOP/s is in the unit
    top = limits["tflops"] * tera
    rate = {id(result): result["tflops"] * tera for result in results}
    intensity = {id(r): r["tflops"] * 1e3 / r["gbs"] for r in results}  # FLOP / byte
    ridge = limits["tflops"] * 1e3 / limits["read_gbs"]
    x = np.array([min(*intensity.values(), ridge) / 2, ridge, max(*intensity.values(), ridge) * 2])
    ax.plot(x, np.minimum(x / ridge, 1) * top, color="black")
    middle = (x[0] * x[1]) ** 0.5
    ax.annotate(
        with_unit(limits["read_gbs"] * 1e9, "B/s"),
        (middle, middle / ridge * top),
        xytext=(-6, 6),
        textcoords="offset points",
        ha="right",
        va="bottom",
        fontsize=9.5,
    )
    ax.annotate(
        with_unit(limits["tflops"] * 1e12, "FLOP/s"),
        (x[2], top),
        xytext=(-4, 5),
        textcoords="offset points",
        ha="right",
        va="bottom",
        fontsize=9.5,
    )
    kinds = sorted({axes.kind(result) for result in results})
    palette = colormaps[COLOURS]
    for i, n in enumerate(kinds):
        chosen = [result for result in results if axes.kind(result) == n]
        ax.scatter(
            [intensity[id(result)] for result in chosen],
            [rate[id(result)] for result in chosen],
            s=[_area(result[axes.size]) for result in chosen],
            marker=MARKERS[i % len(MARKERS)],
            color=palette(LIGHTEST * i / max(1, len(kinds) - 1)),
            alpha=0.75,
            linewidths=0.5,
            edgecolors="black",
            label=f"{n}",
            zorder=3,
        )
    ax.set_xscale("log")
    ax.set_yscale("log")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    sources = dict.fromkeys((limits["read_source"], limits["tflops_source"]))
    ax.set_title(f"lines: {'; '.join(sources)}", loc="left", fontsize=9.5)
    ax.set_xlabel("operations per byte that must be read or written, FLOP/B")
    ax.set_ylabel(unit)
    ax.margins(y=0.1)
    legend = ax.legend(
        title=f"{axes.kind_label};\nsize: {axes.size_label}",
        loc="center left",
        bbox_to_anchor=(1.01, 0.5),
    )
    for handle in legend.legend_handles:
        handle.set_sizes([45.0])  # type: ignore[union-attr]


def _area(size: int) -> float:
    """Of a point, in square points: from a hundred tokens to a million by their logarithm."""
    return float(np.interp(np.log10(size), [2, 6.3], [12, 130]))
