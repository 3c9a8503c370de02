"""Time against size: a panel for each kind of shape, a colour for each series."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes as Panel
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from jax_flashmla.bench.operation import Axes
from jax_flashmla.bench.shape import Result
from jax_flashmla.bench.units import scale_for

PANEL_WIDTH, PANEL_HEIGHT, TITLES_HEIGHT = 4.6, 4.4, 1.2  # inches
LEGEND_WIDTH, MIN_WIDTH = 1.5, 8.0  # inches; the least so that the titles fit
COLUMNS = 3
MAX_TICKS = 8  # of lengths
# Perceptually even and safe for colour-blind readers; its light end is too faint on white.
COLOURS, LIGHTEST = "viridis", 0.82
BLACK: dict[str, Any] = {"color": "black"}
MEASURED: dict[str, Any] = {"marker": "o", "markersize": 5, "linewidth": 1.8}
LIMIT: dict[str, Any] = {"linestyle": "--", "linewidth": 1}
PEER: dict[str, Any] = {"marker": "x", "markersize": 8, "markeredgewidth": 1.8, "linestyle": ""}


def draw_times(figure: Figure, results: list[Result], axes: Axes) -> None:
    """Draws onto the figure, which is resized to the number of panels.

    Args:
        figure: an empty one.
        results: measured shapes; of these, the ones that axes.preferred leaves.
        axes: the operation's.
    """
    chosen = axes.preferred(results)
    panels: dict[tuple[int, ...], list[Result]] = defaultdict(list)
    for result in chosen:
        panels[axes.panel(result)].append(result)
    columns = min(COLUMNS, len(panels))
    lines = -(-len(panels) // columns)
    width = max(columns * PANEL_WIDTH, MIN_WIDTH - LEGEND_WIDTH) + LEGEND_WIDTH
    figure.set_size_inches(width, lines * PANEL_HEIGHT + TITLES_HEIGHT)
    all_axes = list(figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flat)
    series = sorted({result[axes.series] for result in chosen})
    palette = colormaps[COLOURS]
    colours = {n: palette(LIGHTEST * i / max(1, len(series) - 1)) for i, n in enumerate(series)}
    scale, unit = scale_for((result["us_max"] / 1e6 for result in chosen), "s")
    for key, ax in zip(sorted(panels), all_axes, strict=False):
        _draw_panel(ax, panels[key], axes, colours, 1e-6 / scale)
        ax.set_title(axes.panel_title(panels[key][0]))
        _scale(ax, sorted({result[axes.x] for result in chosen}))
        ax.set_xlabel(axes.x_label)
        ax.set_ylabel(f"time of a call, {unit}")
        ax.label_outer()
    for ax in all_axes[len(panels) :]:
        ax.set_visible(False)
    _legends(figure, chosen, axes, colours)


def _draw_panel(
    ax: Panel, results: list[Result], axes: Axes, colours: dict[int, Any], us: float
) -> None:
    """`us`: what a microsecond is in the panel's unit."""
    for n, colour in colours.items():
        series = sorted((r for r in results if r[axes.series] == n), key=lambda r: r[axes.x])
        if not series:
            continue
        x = [result[axes.x] for result in series]
        limit = [result["limit_us"] * us for result in series]
        ax.plot(x, limit, color=colour, **LIMIT)
        if len(series) == 1:  # a dashed line of one point would not show
            ax.plot(x, limit, "_", color=colour, markersize=12)
        ax.vlines(
            x,
            [result["us_min"] * us for result in series],
            [result["us_max"] * us for result in series],
            color=colour,
            linewidth=1,
        )
        ax.plot(x, [result["us"] * us for result in series], color=colour, **MEASURED)
        peers = [(r[axes.x], _peer_us(r)) for r in series]
        there = [(x, peer_us * us) for x, peer_us in peers if peer_us is not None]
        if there:
            ax.plot(*zip(*there, strict=True), color=colour, **PEER)


def _peer_us(result: Result) -> float | None:
    """Of the peer in the same run, else of the best recorded one."""
    return result.get("live_peer_us", result.get("peers", {}).get("best_us"))


def _scale(ax: Panel, sizes: list[int]) -> None:
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.margins(x=0.08, y=0.08)
    powers = [1 << n for n in range(sizes[0].bit_length() - 1, sizes[-1].bit_length() + 1)]
    powers = [n for n in powers if n <= sizes[-1]]
    ax.xaxis.set_major_locator(FixedLocator(powers[:: -(-len(powers) // MAX_TICKS)]))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda n, _: _binary(int(n))))
    ax.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda time, _: f"{time:g}"))


def _binary(n: int) -> str:
    return f"{n // 1024}k" if n >= 1024 else str(n)


def _legends(figure: Figure, results: list[Result], axes: Axes, colours: dict[int, Any]) -> None:
    handles = [
        Line2D([], [], label="jax_flashmla, median (bar: fastest to slowest)", **MEASURED, **BLACK),
        Line2D([], [], label="limit model", **LIMIT, **BLACK),
    ]
    live = {"live_peer_us" in result for result in results if _peer_us(result) is not None}
    if live:
        label = "peer in the same run" if all(live) else "best recorded peer"
        label += " (some: in the same run)" if live == {True, False} else ""
        handles.append(Line2D([], [], label=label, **PEER, **BLACK))
    figure.legend(handles=handles, loc="outside lower left", ncols=len(handles))
    figure.legend(
        handles=[
            Line2D([], [], color=colour, label=str(n), **MEASURED)
            for n, colour in reversed(colours.items())
        ],
        title=axes.series_label,
        loc="outside right center",
    )
