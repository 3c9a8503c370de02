"""Prints measured rows and sums them up."""

import math
from collections.abc import Iterable
from typing import Any

COLUMNS = (  # heading, key of the result, format
    ("b", "b", "{:4d}"),
    ("s_q", "s_q", "{:4d}"),
    ("h_q", "h_q", "{:4d}"),
    ("s_k", "s_k", "{:7d}"),
    ("lengths", "lengths", "{:>8}"),
    ("us", "us", "{:9.2f}"),
    ("TFLOP/s", "tflops", "{:8.4g}"),
    ("GB/s", "gbs", "{:7.4g}"),
    ("of limit", "limit_fraction", "{:9.2f}"),
    ("x peers", "speedup_vs_peers", "{:8.2f}"),
    ("x XLA", "speedup_vs_xla", "{:7.2f}"),
    ("x ref", "speedup_vs_reference", "{:7.2f}"),
)


def _width(template: str) -> int:
    return len(template.format("" if ">" in template else 0))


def header() -> str:
    """The table's heading line."""
    return " ".join(f"{heading:>{_width(template)}}" for heading, _, template in COLUMNS)


def line(result: dict[str, Any]) -> str:
    """One row of the table; a row that failed shows its error instead of numbers."""
    cells = []
    for _, key, template in COLUMNS:
        value = result.get(key)
        cells.append(f"{'-':>{_width(template)}}" if value is None else template.format(value))
    if "error" not in result:
        return " ".join(cells)
    return " ".join(cells[:5]) + "  " + result["error"]


def geometric_mean(values: Iterable[float]) -> float | None:
    """None of nothing."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else None


def _group(result: dict[str, Any]) -> str:
    if result["b"] <= 4:
        return "b <= 4"
    return (
        "b > 4, limit under 60 us" if result["limit_us"] < 60 else "b > 4, limit of 60 us or more"
    )


def summarise(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts, geometric means of the speed-ups (overall and by group) and the slowest row."""
    done = [r for r in results if "error" not in r]
    summary: dict[str, Any] = {"rows": len(results), "failed": len(results) - len(done)}
    for key in ("limit_fraction", "speedup_vs_peers", "speedup_vs_xla", "speedup_vs_reference"):
        measured = [r for r in done if r.get(key) is not None]
        if not measured:
            continue
        groups: dict[str, list[float]] = {}
        if key in ("limit_fraction", "speedup_vs_peers"):
            for r in measured:
                groups.setdefault(_group(r), []).append(r[key])
        worst = min(measured, key=lambda r: r[key])
        summary[key] = {
            "rows": len(measured),
            "geometric_mean": geometric_mean(r[key] for r in measured),
            "by_group": {name: geometric_mean(groups[name]) for name in sorted(groups)},
            "least": worst[key],
            "least_at": {name: worst[name] for name in ("b", "s_q", "h_q", "s_k", "lengths")},
        }
    return summary


SUMMARY_TITLES = {
    "limit_fraction": "fraction of the limit model",
    "speedup_vs_peers": "speed against the fastest recorded peer",
    "speedup_vs_xla": "speed against the XLA composition",
    "speedup_vs_reference": "speed against the pure-JAX reference",
}


def summary_lines(summary: dict[str, Any]) -> list[str]:
    """The summary for people."""
    lines = [f"{summary['rows']} rows, {summary['failed']} failed"]
    for key, title in SUMMARY_TITLES.items():
        if key not in summary:
            continue
        entry = summary[key]
        where = " ".join(f"{name}={value}" for name, value in entry["least_at"].items())
        lines.append(
            f"{title}: geometric mean {entry['geometric_mean']:.2f} over {entry['rows']} rows, "
            f"least {entry['least']:.2f} at {where}"
        )
        lines += [f"    {name}: {mean:.2f}" for name, mean in entry["by_group"].items()]
    return lines
