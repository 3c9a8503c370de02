"""A roofline: the rate of arithmetic against operations per byte, under the device's ceilings."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

COLOURS, LIGHTEST = "viridis", 0.82  # as in latency_plot: even and safe for colour-blind readers
MARKERS = "osD^vP*Xdhp8"  # of the shapes of a tile; colour alone would not tell them apart


def draw_roofline(figure: Figure, rows: list[dict[str, Any]], limits: dict[str, Any]) -> None:
    """Draws onto the figure.

    Args:
        figure: an empty one.
        rows: measured rows. A point's shape and colour say how many queries share a cache row
            (s_q * h_q), its size how many tokens the batch has cached.
        limits: of the document: the two ceilings and where they come from.
    """
    figure.set_size_inches(9, 6)
    ax = figure.subplots()
    flops = {id(row): row["tflops"] for row in rows}
    intensity = {id(row): row["tflops"] * 1e3 / row["gbs"] for row in rows}  # FLOP / byte
    ridge = limits["tflops"] * 1e3 / limits["read_gbs"]
    x = np.array([min(*intensity.values(), ridge) / 2, ridge, max(*intensity.values(), ridge) * 2])
    ax.plot(x, np.minimum(x * limits["read_gbs"] / 1e3, limits["tflops"]), color="black")
    middle = (x[0] * x[1]) ** 0.5
    ax.annotate(
        f"{limits['read_gbs'] / 1e3:.3g} TB/s",
        (middle, middle * limits["read_gbs"] / 1e3),
        xytext=(-6, 6),
        textcoords="offset points",
        ha="right",
        va="bottom",
        fontsize=9.5,
    )
    ax.annotate(
        f"{limits['tflops']:.3g} TFLOP/s",
        (x[2], limits["tflops"]),
        xytext=(-4, 5),
        textcoords="offset points",
        ha="right",
        va="bottom",
        fontsize=9.5,
    )
    queries = sorted({row["s_q"] * row["h_q"] for row in rows})
    palette = colormaps[COLOURS]
    for i, n in enumerate(queries):
        chosen = [row for row in rows if row["s_q"] * row["h_q"] == n]
        ax.scatter(
            [intensity[id(row)] for row in chosen],
            [flops[id(row)] for row in chosen],
            s=[_area(row["cached_tokens"]) for row in chosen],
            marker=MARKERS[i % len(MARKERS)],
            color=palette(LIGHTEST * i / max(1, len(queries) - 1)),
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
    ax.set_xlabel("operations per byte of cache, q and out, FLOP/byte")
    ax.set_ylabel("TFLOP/s")
    legend = ax.legend(
        title="queries a cache row\nserves (s_q x h_q);\nsize: cached tokens",
        loc="center left",
        bbox_to_anchor=(1.01, 0.5),
    )
    for handle in legend.legend_handles:
        handle.set_sizes([45.0])  # type: ignore[union-attr]


def _area(cached_tokens: int) -> float:
    """Of a point, in square points: from a thousand tokens to a million by their logarithm."""
    return float(np.interp(np.log10(cached_tokens), [2, 6.3], [12, 130]))
