"""Sums up measured rows: geometric means and the slowest row, overall and by kind of shape."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

RATIOS = {  # key of a row -> what it says
    "speedup_vs_peers": "speed against the fastest recorded peer",
    "limit_fraction": "fraction of the limit model",
    "speedup_vs_xla": "speed against the XLA composition",
    "speedup_vs_reference": "speed against the pure-JAX reference",
}
SMALL_BATCH = 4  # sequences; at most these few leave the device waiting for latencies
SHORT_US = 60.0  # rows of larger batches whose limit is below this are short


def geometric_mean(values: Iterable[float]) -> float:
    """Of at least one positive number."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def group_of(row: dict[str, Any]) -> str:
    """The kind of shape: what bounds it differs."""
    if row["b"] <= SMALL_BATCH:
        return f"b <= {SMALL_BATCH}"
    if row["limit_us"] < SHORT_US:
        return f"b > {SMALL_BATCH}, limit < {SHORT_US:.0f} us"
    return f"b > {SMALL_BATCH}, limit >= {SHORT_US:.0f} us"


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts, and for each ratio and group its geometric mean and its least row.

    Returns:
        {"rows", "failed", <ratio>: {<group>: {"rows", "geometric_mean", "least", "least_at"}}}; the
        group "all" comes first.
    """
    done = [row for row in rows if "error" not in row]
    summary: dict[str, Any] = {"rows": len(rows), "failed": len(rows) - len(done)}
    for ratio in RATIOS:
        groups: dict[str, list[dict[str, Any]]] = {}
        for row in (row for row in done if row.get(ratio) is not None):
            groups.setdefault("all", []).append(row)
            groups.setdefault(group_of(row), []).append(row)
        if groups:
            names = ["all", *sorted(groups.keys() - {"all"})]
            summary[ratio] = {name: _entry(ratio, groups[name]) for name in names}
    return summary


def _entry(ratio: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    worst = min(rows, key=lambda row: row[ratio])
    return {
        "rows": len(rows),
        "geometric_mean": geometric_mean(row[ratio] for row in rows),
        "least": worst[ratio],
        "least_at": {name: worst[name] for name in ("b", "s_q", "h_q", "s_k", "lengths")},
    }
