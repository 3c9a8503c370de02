"""Sums up measured shapes: geometric means and the slowest, overall and by kind of shape."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from jax_flashmla.bench.operation import Operation
from jax_flashmla.bench.shape import Result

RATIOS = {  # key of a result -> what it says
    "speedup_vs_peers": "speed against the fastest recorded peer",
    "speedup_vs_live_peer": "speed against the peer in the same run",
    "limit_fraction": "fraction of the limit model",
    "speedup_vs_xla": "speed against the XLA composition",
    "speedup_vs_reference": "speed against the pure-JAX reference",
}
WIDE_SPREAD = 0.25  # (slowest - fastest sample) / median, above which a time says little


def exceeds_limit(result: Result) -> bool:
    """Whether the shape was faster than the limit model allows: then the limit is wrong, not the
    shape fast."""
    return result.get("limit_fraction", 0.0) > 1.0


def spread(result: Result) -> float:
    """Of the samples around their median."""
    return (result["us_max"] - result["us_min"]) / result["us"]


def geometric_mean(values: Iterable[float]) -> float:
    """Of at least one positive number."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def summarise(operation: Operation, results: list[Result]) -> dict[str, Any]:
    """Counts, and for each ratio and group its geometric mean and its least shape.

    A fraction of a limit that was exceeded is in no mean.

    Returns:
        {"shapes", "failed", "wide_spread", "limit_exceeded",
        <ratio>: {<group>: {"shapes", "geometric_mean", "least", "least_at"}}}; the group "all"
        comes first.
    """
    done = [result for result in results if "error" not in result]
    summary: dict[str, Any] = {
        "shapes": len(results),
        "failed": len(results) - len(done),
        "wide_spread": sum(spread(result) > WIDE_SPREAD for result in done),
        "limit_exceeded": sum(map(exceeds_limit, done)),
    }
    for ratio in RATIOS:
        groups: dict[str, list[Result]] = {}
        for result in done:
            if result.get(ratio) is None or (ratio == "limit_fraction" and exceeds_limit(result)):
                continue
            groups.setdefault("all", []).append(result)
            groups.setdefault(operation.group(result), []).append(result)
        if groups:
            names = ["all", *sorted(groups.keys() - {"all"})]
            summary[ratio] = {name: _entry(ratio, groups[name], operation) for name in names}
    return summary


def _entry(ratio: str, results: list[Result], operation: Operation) -> dict[str, Any]:
    worst = min(results, key=lambda result: result[ratio])
    return {
        "shapes": len(results),
        "geometric_mean": geometric_mean(result[ratio] for result in results),
        "least": worst[ratio],
        "least_at": {name: worst[name] for name in operation.fields},
    }
