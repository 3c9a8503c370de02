"""Tables of one file of results, in Markdown, for performance_doc.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Document = dict[str, Any]
Result = dict[str, Any]  # of one shape

RATIOS = {  # key of a summary -> what it says
    "speedup_vs_live_peer": "times the peer in the same run",
    "speedup_vs_peers": "times the fastest recorded peer",
    "limit_fraction": "fraction of the limit",
    "speedup_vs_xla": "times plain XLA",
}
# Of an operation: our own shape that others are compared with, by the fields that differ.
COUNTERPARTS: dict[str, tuple[str, Result, Callable[[Result], bool]]] = {
    "dense_decode": ("times our bfloat16", {"format": "dense"}, lambda _: True),
    "sparse_decode": ("times ours of 64 heads", {"h_q": 64}, lambda result: result["h_q"] < 64),
    "index_scores": ("times ours of 2 query tokens", {"s_q": 2}, lambda result: result["s_q"] > 2),
    "layer_step": ("times the layer with dense attention", {"model": "v3"}, lambda _: True),
}


def markdown(header: list[str], lines: list[list[str]]) -> str:
    """A table, without the columns that no line fills; empty without lines."""
    if not lines:
        return ""
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


def commit(document: Document) -> str:
    """Of the sources that were measured, as the file records it."""
    changed = " and uncommitted changes" if document.get("uncommitted_changes") else ""
    return (document["commit"] or "unknown")[:7] + changed


def tokens(count: int | None) -> str:
    if count is None:
        return ""
    return f"{count // 1024}k" if count % 1024 == 0 else str(count)


def summary(document: Document) -> str:
    """Geometric means of a grid's groups, and the least shape of all."""
    found = document["summary"]
    lines = []
    for group in found["limit_fraction"]:
        line = [group]
        for ratio in RATIOS:
            entry = found.get(ratio, {}).get(group)
            count = entry and entry.get("shapes", entry.get("rows"))
            line += [
                number(entry and entry["geometric_mean"]),
                number(entry and entry["least"]),
                str(count or ""),
            ]
        lines.append(line)
    header = ["Group"]
    for name in RATIOS.values():
        header += [name, "least", "shapes"]
    return markdown(header, lines)


def shapes(document: Document) -> str:
    """One line for each shape of a grid."""
    own, *_ = COUNTERPARTS.get(document.get("operation", ""), ("",))
    header = [
        "model", "b", "query tokens", "heads", "top k", "of an extra cache", "cached tokens",
        "columns", "lengths", "format", "us", "samples, us", "lasting load, us", "TB/s", "TFLOP/s",
        "kernels alone, us", "weights read once, us", "limit, us", "of limit",
        "peer in this run, us", "times this peer", "fastest recorded peer, us",
        "times the recorded peer", "plain XLA, us", "times XLA", own, "calls in graphs",
    ]  # fmt: skip
    beside = counterparts(document)
    lines = [shape_line(r, beside[i]) for i, r in enumerate(results_of(document))]
    return markdown(header, lines)


def counterparts(document: Document) -> list[float | None]:
    """Of each shape: how many times as fast it is as the shape of ours that is its counterpart."""
    results = results_of(document)
    if document.get("operation") not in COUNTERPARTS:
        return [None] * len(results)
    _, fields, compared = COUNTERPARTS[document["operation"]]
    names = list(next(iter(document["summary"]["limit_fraction"].values()))["least_at"])
    times = {tuple(r[name] for name in names): r.get("us") for r in results}
    found = []
    for result in results:
        us = times.get(tuple({**result, **fields}[name] for name in names))
        same = all(result[name] == value for name, value in fields.items())
        is_compared = us is not None and "us" in result and not same and compared(result)
        found.append(us / result["us"] if is_compared else None)
    return found


def shape_line(result: Result, beside: float | None = None) -> list[str]:
    line = [result.get("model", ""), str(result.get("b", ""))]
    heads = result.get("h_q", result.get("heads"))
    line += [str(result.get("s_q", "")), str(heads or "scores given")]
    line += [str(result.get(name) or "") for name in ("topk", "extra_topk")]
    line += [tokens(result.get("s_k", result.get("s_kv")))]
    line += [str(result.get(name, "")) for name in ("d_qk", "lengths", "format")]
    if "error" in result:
        return [*line, "failed", *[""] * 16]
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
        number(result.get("alone_us")),
        number(result.get("read_once_us")),
        number(result["limit_us"]),
        number(fraction) + (" (exceeded)" if fraction > 1 else ""),
        number(result.get("live_peer_us")),
        number(result.get("speedup_vs_live_peer")),
        number(peers.get("best_us")),
        number(result.get("speedup_vs_peers")),
        number(result.get("xla_us")),
        number(result.get("speedup_vs_xla")),
        number(beside),
        f"{inside} of {inside + outside}" if graphs else "",
    ]
