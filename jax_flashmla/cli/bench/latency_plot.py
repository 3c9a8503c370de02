"""Time against length: one panel for each head count, one colour for each batch size."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

PANEL_WIDTH, PANEL_HEIGHT, TITLES_HEIGHT = 5.2, 4.6, 1.2  # inches
COLUMNS = 3
MIN_WIDTH = 8.0  # inches, so that the titles fit
# Perceptually even and safe for colour-blind readers; its light end is too faint on white.
COLOURS, LIGHTEST = "viridis", 0.82

Rows = list[dict[str, Any]]


def draw_latency(figure: Figure, rows: Rows, limits: dict[str, Any]) -> None:
    """Draws onto the figure, which is resized to the number of panels.

    Args:
        figure: an empty one.
        rows: measured rows. Those of unequal lengths are left out while there are others, and so
            are those of s_q > 1: a panel shows rows that differ in batch and length alone.
        limits: of the document; only the overhead is named.
    """
    chosen = _preferred(rows)
    panels: dict[tuple[int, int], Rows] = defaultdict(list)
    for row in chosen:
        panels[row["h_q"], row["s_q"]].append(row)
    columns = min(COLUMNS, len(panels))
    lines = -(-len(panels) // columns)
    width = max(columns * PANEL_WIDTH, MIN_WIDTH)
    figure.set_size_inches(width, lines * PANEL_HEIGHT + TITLES_HEIGHT)
    axes = list(figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flat)
    batches = sorted({row["b"] for row in chosen})
    palette = colormaps[COLOURS]
    colours = {b: palette(LIGHTEST * i / max(1, len(batches) - 1)) for i, b in enumerate(batches)}
    for (h_q, s_q), ax in zip(sorted(panels), axes, strict=False):
        _draw_panel(ax, panels[h_q, s_q], colours)
        heads = "1 head" if h_q == 1 else f"{h_q} heads"
        ax.set_title(heads + (f", {s_q} query tokens" if s_q > 1 else ""))
        _scale(ax, chosen)
        ax.set_xlabel("cached tokens of each sequence")
        ax.set_ylabel("time of a call, microseconds")
        ax.label_outer()
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    _legend(figure, chosen)


def _preferred(rows: Rows) -> Rows:
    for condition in (lambda row: row["lengths"] == "equal", lambda row: row["s_q"] == 1):
        rows = [row for row in rows if condition(row)] or rows
    return rows


def _draw_panel(ax: Axes, rows: Rows, colours: dict[int, Any]) -> None:
    for b, colour in colours.items():
        series = sorted((row for row in rows if row["b"] == b), key=lambda row: row["s_k"])
        if not series:
            continue
        lengths = [row["s_k"] for row in series]
        ax.plot(lengths, [row["limit_us"] for row in series], "--", color=colour, linewidth=1)
        if len(series) == 1:  # a dashed line of one point would not show
            ax.plot(lengths, [series[0]["limit_us"]], "_", color=colour, markersize=12)
        ax.plot(
            lengths, [row["us"] for row in series], "o-", color=colour, linewidth=1.8, markersize=5
        )
        peers = [(row["s_k"], row["peers"]["best_us"]) for row in series if "peers" in row]
        if peers:
            ax.plot(*zip(*peers, strict=True), "x", color=colour, markersize=8, markeredgewidth=1.8)
        ax.annotate(
            str(b),
            (lengths[-1], series[-1]["us"]),
            xytext=(7, -1),
            textcoords="offset points",
            color=colour,
            fontsize=10,
            va="center",
            annotation_clip=False,
            fontweight="bold",
        )


def _scale(ax: Axes, rows: Rows) -> None:
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.margins(x=0.08)  # room for the labels at the right ends
    lengths = sorted({row["s_k"] for row in rows})
    powers = [1 << n for n in range(lengths[0].bit_length() - 1, lengths[-1].bit_length() + 1)]
    ax.xaxis.set_major_locator(FixedLocator(powers[:: 1 if len(powers) < 9 else 2]))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda n, _: _tokens(int(n))))
    ax.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda us, _: f"{us:g}"))


def _tokens(n: int) -> str:
    return f"{n // 1024}k" if n >= 1024 else str(n)


def _legend(figure: Figure, rows: Rows) -> None:
    black: dict[str, Any] = {"color": "black"}
    handles = [
        Line2D([], [], marker="o", markersize=5, linewidth=1.8, label="jax_flashmla", **black),
        Line2D([], [], linestyle="--", linewidth=1, label="limit model", **black),
    ]
    if any("peers" in row for row in rows):
        cross: dict[str, Any] = {
            "marker": "x",
            "markersize": 8,
            "markeredgewidth": 1.8,
            "linestyle": "",
        }
        handles.append(Line2D([], [], label="best recorded peer", **cross, **black))
    number: dict[str, Any] = {"marker": "$128$", "markersize": 22, "linestyle": ""}
    handles.append(Line2D([], [], label="sequences in the batch", **number, **black))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
