"""All that is recorded on one card of the operations, in Markdown, for performance_doc.py.

A file says which operation it is of; its plot is beside it under the same name. Where a card has
several files of one, these are named <operation>_<what>.json.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import geometric_mean

from performance_tables import Document, commit, markdown, number, shapes, summary

TITLES = {  # operation -> heading, and its peer in the same run
    "sparse_decode": ("Sparse decode", "FlashMLA's frozen Hopper kernel"),
    "sparse_prefill": ("Sparse prefill", "FlashMLA's frozen Hopper kernel"),
    "dense_decode": ("Dense decode", "FlashMLA's frozen Hopper kernel"),
    "index_topk": ("Indexer: selection", "DeepGEMM's logits and SGLang's top-k"),
    "index_scores": ("Indexer: scores", "DeepGEMM's logits"),
    "layer_step": ("A layer's decoding step", ""),
}
OF_GRIDS = {  # (operation, grid) -> likewise
    ("dense_decode", "fp8"): ("Dense decode over fp8 caches", "FlashMLA's fp8 kernel"),
}


def documents(folder: Path) -> list[tuple[Path, Document]]:
    """A card's files, operation after operation."""
    found = [(path, json.loads(path.read_text())) for path in sorted(folder.glob("*.json"))]
    of_operations = [pair for pair in found if pair[1].get("operation") in TITLES]
    return sorted(of_operations, key=lambda pair: list(TITLES).index(pair[1]["operation"]))


def heading(path: Path, document: Document) -> tuple[str, str]:
    """The title, with what the file's name has behind the operation's, and the peer."""
    operation = document["operation"]
    what = path.stem.removeprefix(f"{operation}_")
    title, peer = OF_GRIDS.get((operation, document["grid"]), TITLES[operation])
    return title if what == path.stem else f"{title}: {what}", peer


def card(folder: Path) -> str:
    """A section for each file: what ran, its plot, its groups, its shapes."""
    return "\n".join(_section(path, document) for path, document in documents(folder))


def _section(path: Path, document: Document) -> str:
    title, peer = heading(path, document)
    place = f"../benchmarks/results/{path.parent.name}"
    cut = f" (its first {len(document['shapes'])} shapes)" if document["interrupted"] else ""
    lines = [
        f"### {title}\n",
        f"[{path.name}]({place}/{path.name}): grid `{document['grid']}`{cut}, "
        f"{document['hardware']['device']}, commit {commit(document)}, "
        f"{document['date'][:10]}."
        + (f" The peer in the same run is {peer}." if peer else "")
        + _recorded(document)
        + _gather(document)
        + "\n",
    ]
    plot = path.with_suffix(".png")
    if plot.is_file():
        lines.append(f"![{title}: time of a call]({place}/{plot.name})\n")
    return "\n".join([*lines, summary(document), shapes(document)])


def _recorded(document: Document) -> str:
    """The speed over the shapes that the targets were set for."""
    ratios = [
        result["speedup_vs_live_peer"]
        for result in document["shapes"]
        if "peers" in result and "speedup_vs_live_peer" in result
    ]
    if not ratios:
        return ""
    count = "shape" if len(ratios) == 1 else f"{len(ratios)} shapes"
    mean = number(geometric_mean(ratios))
    return f" Over the {count} recorded of it before, {mean} times its speed."


def _gather(document: Document) -> str:
    """What the limit takes rows at random places to cost."""
    rates = document["limits"].get("gather_gbs") or {}
    measured = document["ceilings"].get("gather_gbs") or {}
    if not rates:
        return ""
    by_xla = {size: f" (XLA {gbs / 1e3:.2f})" for size, gbs in measured.items()}
    each = ", ".join(
        f"{size} B {gbs / 1e3:.2f}{by_xla.get(size, '')}" for size, gbs in rates.items()
    )
    return f" Rows are gathered at, in TB/s: {each}: {document['limits']['gather_source']}."


def _mean(entry: Document, measured: int) -> str:
    """A ratio's geometric mean, and over how many shapes where those are not all."""
    some = "" if entry["shapes"] == measured else f" over {entry['shapes']}"
    return number(entry["geometric_mean"]) + some


def compact(folder: Path) -> str:
    """The card's picture, and a line for each file: speed against the live peer and plain XLA,
    share of the limit. For README.md."""
    lines = []
    for path, document in documents(folder):
        found = document["summary"]
        title, peer = heading(path, document)
        live, xla, limit = (
            found.get(ratio, {}).get("all")
            for ratio in ("speedup_vs_live_peer", "speedup_vs_xla", "limit_fraction")
        )
        if limit is None:
            continue
        lines.append(
            [
                title,
                str(count := len(document["shapes"])),
                peer,
                _mean(live, count) + f" (least {number(live['least'])})" if live else "",
                _mean(xla, count) if xla else "",
                _mean(limit, count),
            ]
        )
    header = ["Operation", "shapes", "peer", "times the peer", "times plain XLA", "of the limit"]
    plot = folder / "operations.png"
    place = f"benchmarks/results/{folder.name}/{plot.name}"
    picture = f"![Speed against the peer in the same run]({place})\n\n" if plot.is_file() else ""
    return picture + markdown(header, lines) if lines else ""
