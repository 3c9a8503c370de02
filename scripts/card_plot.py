"""Draws how many times as fast as the peer in the same run each operation is on a card.

python scripts/card_plot.py h100     # rewrites benchmarks/results/h100/operations.png
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from performance_card import documents, heading  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
RATIO = "speedup_vs_live_peer"
COLOUR, FAINT = "#1668b8", "#9cc3e6"
LINE_HEIGHT, MARGIN = 0.27, 1.3  # inches


def rows_of(folder: Path) -> list[tuple[str, list[float], float]]:
    """Of each operation and each of its groups: name, every shape's ratio, their geometric mean."""
    from jax_flashmla.bench.operations import OPERATIONS

    rows = []
    for path, document in documents(folder):
        operation = OPERATIONS[document["operation"]]
        title, peer = heading(path, document)
        for name, entry in document["summary"].get(RATIO, {}).items():
            ratios = [
                result[RATIO]
                for result in document["shapes"]
                if RATIO in result and name in ("all", operation.group(result))
            ]
            label = f"{title}, against {peer}" if name == "all" else name
            rows.append((label, ratios, entry["geometric_mean"]))
    return rows


def draw(folder: Path) -> Figure:
    """A line for each group: a dot for each shape, a bar and a number for their mean."""
    rows = rows_of(folder)
    figure = Figure(figsize=(9.6, MARGIN + LINE_HEIGHT * len(rows)), dpi=160, layout="constrained")
    axes = figure.subplots()
    for place, (label, ratios, mean) in enumerate(rows):
        axes.plot(ratios, [place] * len(ratios), "o", color=FAINT, markersize=4, alpha=0.7)
        axes.plot([mean], [place], "|", color=COLOUR, markersize=13, markeredgewidth=2.5)
        right = axes.get_yaxis_transform()
        weight = "bold" if ", against " in label else "normal"
        axes.text(
            1.01, place, f"{mean:.2f}", transform=right, va="center", fontsize=9, weight=weight
        )
    axes.set_yticks(range(len(rows)), [label for label, _, _ in rows], fontsize=9)
    for tick, (label, _, _) in zip(axes.get_yticklabels(), rows, strict=True):
        tick.set_weight("bold" if ", against " in label else "normal")
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(base=10, subs=(1, 1.5, 2, 3, 5, 7)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.axvline(1, color="#555555", linewidth=0.8)
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("times as fast as the peer in the same run: a dot a shape, a bar the mean")
    figure.supxlabel(_source(folder), fontsize=8, color="#555555")
    return figure


def _source(folder: Path) -> str:
    found: dict[str, Any] = {}
    for _, document in documents(folder):
        hardware, commit = document["hardware"], (document["commit"] or "unknown")[:7]
        device = hardware.get("name", hardware["device"])
        found[f"{device}, commit {commit}, {document['date'][:10]}"] = None
    return "; ".join(found)


def main(argv: list[str]) -> int:
    if len(argv) != 1 or not (RESULTS / argv[0]).is_dir():
        print(__doc__.splitlines()[2], file=sys.stderr)
        return 2
    folder = RESULTS / argv[0]
    figure = draw(folder)
    FigureCanvasAgg(figure)
    figure.savefig(folder / "operations.png")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
