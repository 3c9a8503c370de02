"""Rewrites the tables of docs/performance.md and README.md from benchmarks/results/<card>/*.json.

    python scripts/performance_doc.py            # after new results
    python scripts/performance_doc.py --check    # exit status 1 if a page is not what it would be

A table stands between two comments; what lies between them is replaced:

    <!-- table: runs h200 -->                    every file of a card: commit, date, versions
    <!-- table: card h100 -->                    every operation's file of a card: all that it says
    <!-- table: compact h100 -->                 a line for each file of a card
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

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from performance_card import card, compact  # noqa: E402
from performance_tables import (  # noqa: E402
    Document,
    commit,
    markdown,
    number,
    results_of,
    shapes,
    summary,
)

RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"
PAGES = (PAGE, ROOT / "README.md")

TABLE = re.compile(
    r"(<!-- table: (?P<kind>\w+) (?P<path>[\w./-]+) -->\n).*?(<!-- end -->)", re.DOTALL
)


def runs(folder: Path) -> str:
    """One line for each file of a card."""
    lines = []
    for path in sorted(folder.glob("*.json")):
        document = json.loads(path.read_text())
        hardware, versions = document["hardware"], document["versions"]
        ceilings = document.get("ceilings") or {}
        lines.append(
            [
                f"[{path.name}](../benchmarks/results/{folder.name}/{path.name})",
                commit(document),
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
CARD_TABLES: dict[str, Callable[[Path], str]] = {"runs": runs, "card": card, "compact": compact}


def rewrite(page: str, results: Path) -> str:
    """The page with its tables made anew.

    Raises:
        ValueError: a comment names a table that is none.
        OSError: or a file that cannot be read.
    """

    def table(match: re.Match[str]) -> str:
        kind, path = match["kind"], results / match["path"]
        if kind in CARD_TABLES:
            content = CARD_TABLES[kind](path)
        elif kind in TABLES:
            content = TABLES[kind](json.loads(path.read_text()))
        else:
            known = ", ".join([*CARD_TABLES, *TABLES])
            raise ValueError(f"a table is {known}; got {kind!r}")
        return f"{match[1]}\n{content}\n{match[4]}"

    return TABLE.sub(table, page)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only compare; 1 if stale")
    arguments = parser.parse_args(argv)
    stale = 0
    for page in PAGES:
        old = page.read_text()
        new = rewrite(old, RESULTS)
        stale |= new != old
        if not arguments.check:
            page.write_text(new)
    return int(stale) if arguments.check else 0


if __name__ == "__main__":
    sys.exit(main())
