"""Draws results as PNG: time against size for each kind of shape, and a roofline."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from jax_flashmla.bench.operations import OPERATIONS
from jax_flashmla.bench.roofline_plot import draw_roofline
from jax_flashmla.bench.time_plot import draw_times

STYLE: Any = {  # of matplotlib's rcParams
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.grid": True,
    "axes.grid.which": "major",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "savefig.dpi": 150,
}


def draw(document: dict[str, Any], folder: Path) -> list[Path]:
    """Writes <grid>_latency.png and <grid>_roofline.png; returns the files written.

    Shapes that failed are left out; where nothing is left, nothing is drawn.
    """
    results = [result for result in document["shapes"] if "error" not in result]
    if not results:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    axes = OPERATIONS[document["operation"]].axes
    times, roofline = (Figure(layout="constrained") for _ in range(2))
    paths = []
    # Figure by itself, without pyplot, needs no display and changes no global state but the style,
    # which ends with the context.
    with matplotlib.rc_context(STYLE):
        draw_times(times, results, axes)
        draw_roofline(roofline, results, axes, document["limits"])
        for name, figure in (("latency", times), ("roofline", roofline)):
            figure.suptitle(_title(document), fontsize=11.5, x=0.01, ha="left", linespacing=1.4)
            paths.append(folder / f"{document['grid']}_{name}.png")
            figure.savefig(paths[-1])
    return paths


def _title(document: dict[str, Any]) -> str:
    """What ran on what, in two lines."""
    hardware = document["hardware"]
    device = re.sub(r"\s+", " ", hardware.get("name", hardware["device"]))
    if "power_limit" in hardware:  # as nvidia-smi prints it: "700.00 W"
        device += f", {hardware['power_limit'].replace('.00', '')}"
    commit = f", commit {document['commit'][:7]}" if document["commit"] else ""
    return (
        f"{document['operation']} on {device}: {document['dtype']}, blocks of "
        f"{document['block_size']} tokens"
        f"\njax {document['versions']['jax']}{commit}, {document['date'][:10]}"
    )
