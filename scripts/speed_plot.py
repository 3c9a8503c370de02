"""Draws README's picture: times of a call beside the alternatives, from the recorded results.

python scripts/speed_plot.py     # rewrites benchmarks/results/h200/speed.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "h200"
SHAPES = (  # sequences, heads, cached tokens of each: small, middle and large, at both head counts
    (1, 16, 32768),
    (16, 16, 4096),
    (128, 16, 4096),
    (1, 128, 8192),
    (16, 128, 4096),
    (128, 128, 4096),
)
BARS = {  # label -> colour, and where a result has the time
    "jax_flashmla": ("#1668b8", ("us",)),
    "FlashMLA": ("#8c8c8c", ("peers", "flashmla_us")),
    "FlashAttention-3": ("#aeaeae", ("peers", "fa3_us")),
    "FlashInfer": ("#cfcfcf", ("peers", "flashinfer_us")),
    "plain XLA": ("#e0a458", ("xla_us",)),
}


def times(result: dict[str, Any]) -> dict[str, float]:
    """Microseconds a call, of those that were measured at a shape."""
    found = {}
    for label, (_, keys) in BARS.items():
        value: Any = result
        for key in keys:
            value = (value or {}).get(key)
        if value is not None:
            found[label] = value
    return found


def shapes(document: dict[str, Any]) -> list[dict[str, Any]]:
    """The results of SHAPES, in their order."""
    by_shape = {
        (r["b"], r["h_q"], r["s_k"]): r
        for r in document.get("shapes", document.get("rows"))
        if r["s_q"] == 1 and r["lengths"] == "equal"
    }
    return [by_shape[shape] for shape in SHAPES]


def draw(document: dict[str, Any]) -> Figure:
    """Bars as multiples of our time, each with its microseconds."""
    figure = Figure(figsize=(9.6, 3.9), dpi=160, layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(BARS)
    for place, result in enumerate(shapes(document)):
        found = times(result)
        for number, label in enumerate(BARS):
            if label not in found:
                continue
            height = found[label] / found["jax_flashmla"]
            x = place + (number - (len(BARS) - 1) / 2) * width
            axes.bar(
                x, height, width * 0.94, color=BARS[label][0], label=label if place == 0 else ""
            )
            text = f"{found[label]:.0f}" if found[label] >= 10 else f"{found[label]:.1f}"
            axes.text(x, height + 0.06, text, ha="center", va="bottom", fontsize=7.5)
    names = [f"{b} x {s // 1024}k tokens\n{h} heads" for b, h, s in SHAPES]
    axes.set_xticks(range(len(SHAPES)), names, fontsize=9)
    axes.set_ylabel("time of a call, jax_flashmla = 1")
    axes.axhline(1, color="#1668b8", linewidth=0.8, linestyle=":")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="x", length=0)
    axes.legend(ncols=len(BARS), frameon=False, loc="upper center", bbox_to_anchor=(0.5, 1.13))
    hardware = document["hardware"]["name"]
    figure.supxlabel(
        f"Paged MLA decoding, {document['dtype']}, {hardware}; numbers are microseconds, less is "
        f"better. Commit {document['commit']}, {document['date'][:10]}; peers as recorded "
        "on another such card.",
        fontsize=8,
        color="#555555",
    )
    return figure


def main() -> int:
    document = json.loads((RESULTS / "targets.json").read_text())
    figure = draw(document)
    FigureCanvasAgg(figure)
    figure.savefig(RESULTS / "speed.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
