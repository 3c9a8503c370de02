"""Rewrites the tables of docs/performance.md from benchmarks/results/<card>/*.json.

    python scripts/performance_doc.py            # after new results
    python scripts/performance_doc.py --check    # exit status 1 if the page is not what it would be

A table stands between two comments; what lies between them is replaced:

    <!-- table: runs h200 -->                    every file of a card: commit, date, versions
    <!-- table: summary h200/targets.json -->    geometric means of a grid's groups
    <!-- table: shapes h200/targets.json -->     every shape of a grid
    <!-- table: step h200/mla_step.json -->      benchmarks/bench_mla_step.py
    <!-- end -->
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"

Document = dict[str, Any]
Result = dict[str, Any]  # of one shape

TABLE = re.compile(
    r"(<!-- table: (?P<kind>\w+) (?P<path>[\w./-]+) -->\n).*?(<!-- end -->)", re.DOTALL
)


def markdown(header: list[str], lines: list[list[str]]) -> str:
    """A table, without the columns that no line fills."""
    filled = [i for i in range(len(header)) if any(line[i] for line in lines)]
    table = [header, ["---"] * len(header), *lines]
    return "".join("| " + " | ".join(line[i] for i in filled) + " |\n" for line in table)


def results_of(document: Document) -> list[Result]:
    """What was measured: "rows" in files of before November 2026."""
    return next(document[key] for key in ("shapes", "steps", "rows") if key in document)


def number(value: float | None, digits: int = 3) -> str:
    """With so many digits, and not fewer than its whole ones; "" for None."""
    if value is None:
        return ""
    whole = len(str(int(abs(value))))
    return f"{value:,.{max(0, digits - whole)}f}"


def tokens(count: int) -> str:
    return f"{count // 1024}k" if count % 1024 == 0 else str(count)


def runs(card: Path) -> str:
    """One line for each file of a card."""
    lines = []
    for path in sorted(card.glob("*.json")):
        document = json.loads(path.read_text())
        hardware, versions = document["hardware"], document["versions"]
        ceilings = document.get("ceilings") or {}
        lines.append(
            [
                f"[{path.name}](../benchmarks/results/{card.name}/{path.name})",
                str(document["commit"]),
                document["date"][:10],
                hardware["device"],
                hardware.get("power_limit") or "",
                hardware.get("driver") or "",
                versions["jax"],
                number(ceilings.get("read_gbs", 0) / 1e3, 3),
                number(ceilings.get("matmul_tflops"), 3),
            ]
        )
    header = (
        "File, Commit, Date, Card, Power limit, Driver, jax, XLA reads TB/s, multiplies TFLOP/s"
    )
    return markdown(header.split(", "), lines)


def summary(document: Document) -> str:
    """Geometric means of a grid's groups, and the least shape of all."""
    found = document["summary"]
    ratios = {
        "speedup_vs_live_peer": "times FlashMLA in the same run",
        "speedup_vs_peers": "times the fastest peer",
        "limit_fraction": "fraction of the limit",
        "speedup_vs_xla": "times plain XLA",
    }
    groups = list(found["limit_fraction"])
    lines = []
    for group in groups:
        line = [group]
        for ratio in ratios:
            entry = found.get(ratio, {}).get(group)
            count = entry and entry.get("shapes", entry.get("rows"))
            line += [
                number(entry and entry["geometric_mean"]),
                number(entry and entry["least"]),
                str(count or ""),
            ]
        lines.append(line)
    header = ["Group"]
    for name in ratios.values():
        header += [name, "least", "shapes"]
    return markdown(header, lines)


def shapes(document: Document) -> str:
    """One line for each shape of a grid."""
    header = [
        "b", "query tokens", "heads", "top k", "of an extra cache", "cached tokens", "lengths",
        "format", "us", "samples", "lasting load", "TB/s", "TFLOP/s", "limit", "of limit",
        "FlashMLA in this run", "times that", "fastest peer", "times the peer", "plain XLA",
        "times XLA", "calls in graphs",
    ]  # fmt: skip
    return markdown(header, [shape_line(result) for result in results_of(document)])


def shape_line(result: Result) -> list[str]:
    line = [str(result[name]) for name in ("b", "s_q", "h_q")]
    line += [str(result.get(name) or "") for name in ("topk", "extra_topk")]
    line += [tokens(result["s_k"]), result.get("lengths", ""), result.get("format", "")]
    if "error" in result:
        return [*line, "failed", *[""] * 13]
    fraction = result["limit_fraction"]
    peers = result.get("peers") or {}
    graphs = result.get("command_buffers") or {}
    inside, outside = graphs.get("calls_inside"), graphs.get("calls_outside")
    return [
        *line,
        number(result["us"]),
        f"{number(result['us_min'])} to {number(result['us_max'])}",
        number(result.get("us_sustained")),
        number(result["gbs"] / 1e3),
        number(result["tflops"]),
        number(result["limit_us"]),
        number(fraction) + (" (exceeded)" if fraction > 1 else ""),
        number(result.get("live_peer_us")),
        number(result.get("speedup_vs_live_peer")),
        number(peers.get("best_us")),
        number(result.get("speedup_vs_peers")),
        number(result.get("xla_us")),
        number(result.get("speedup_vs_xla")),
        f"{inside} of {inside + outside}" if graphs else "",
    ]


def step(document: Document) -> str:
    """A decoding step of a model's attention layers, its kernels alone, and reading once."""
    header = [
        "heads",
        "step, ms",
        "samples",
        "kernels alone, ms",
        "samples",
        "share",
        "read once, ms",
    ]
    lines = []
    for result in results_of(document):
        line = [str(result["h_q"])]
        for timing in (result["step"], result["kernels"]):
            least, most = number(timing["us_min"] / 1e3), number(timing["us_max"] / 1e3)
            line += [number(timing["us"] / 1e3), f"{least} to {most}"]
        lines.append(
            [*line, f"{result['kernels_share']:.0%}", number(result["read_once_us"] / 1e3)]
        )
    return markdown(header, lines)


TABLES: dict[str, Callable[[Document], str]] = {"summary": summary, "shapes": shapes, "step": step}


def rewrite(page: str, results: Path) -> str:
    """The page with its tables made anew.

    Raises:
        ValueError: a comment names a table that is none.
        OSError: or a file that cannot be read.
    """

    def table(match: re.Match[str]) -> str:
        kind, path = match["kind"], results / match["path"]
        if kind == "runs":
            content = runs(path)
        elif kind in TABLES:
            content = TABLES[kind](json.loads(path.read_text()))
        else:
            raise ValueError(f"a table is runs, {', '.join(TABLES)}; got {kind!r}")
        return f"{match[1]}\n{content}\n{match[4]}"

    return TABLE.sub(table, page)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only compare; 1 if stale")
    arguments = parser.parse_args(argv)
    old = PAGE.read_text()
    new = rewrite(old, RESULTS)
    if arguments.check:
        return int(new != old)
    PAGE.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
