"""Compares two results of the benchmark, shape by shape. Imports neither JAX nor matplotlib."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from jax_flashmla.bench.operation import Operation
from jax_flashmla.bench.operations import OPERATIONS
from jax_flashmla.bench.shape import Result
from jax_flashmla.bench.summary import geometric_mean

TOLERANCE = 0.03  # single cards of one kind differ by as much


@dataclass(frozen=True)
class Change:
    """One shape in both results."""

    old: Result
    new: Result
    tolerance: float

    @property
    def failed(self) -> bool:
        """Whether it was measured before and fails now."""
        return "error" in self.new and "error" not in self.old

    @property
    def ratio(self) -> float | None:
        """New time over old time; None where one of them failed."""
        if "error" in self.old or "error" in self.new:
            return None
        return float(self.new["us"] / self.old["us"])

    @property
    def verdict(self) -> str:
        """ "slower" or "faster" where the medians differ by more than the tolerance and no sample
        of one lies within the other's; "failed", "repaired"; "" for no change beyond noise."""
        if self.ratio is None:
            return "failed" if self.failed else "repaired" if "error" not in self.new else ""
        if self.ratio > 1 + self.tolerance and self.new["us_min"] > self.old["us_max"]:
            return "slower"
        if self.ratio < 1 / (1 + self.tolerance) and self.new["us_max"] < self.old["us_min"]:
            return "faster"
        return ""


@dataclass(frozen=True)
class Comparison:
    """What became of every shape of the old results."""

    operation: Operation
    differences: list[str]  # in what was measured, and on what
    changes: list[Change]
    missing: list[Result]  # not in the new results

    @property
    def regressions(self) -> int:
        """Shapes that are slower beyond noise, fail or are missing."""
        bad = [change for change in self.changes if change.verdict in ("slower", "failed")]
        return len(bad) + len(self.missing)

    def lines(self) -> Iterator[str]:
        """The comparison as text."""
        yield from (f"! differs: {difference}" for difference in self.differences)
        fields = self.operation.fields
        yield " ".join(f"{name:>7}" for name in fields) + "    old us    new us  new/old"
        for change in self.changes:
            times = [
                f"{'failed' if 'error' in result else format(result['us'], '.2f'):>9}"
                for result in (change.old, change.new)
            ]
            ratio = "-" if change.ratio is None else f"{change.ratio:.3f}"
            verdict = f"  {change.verdict}" if change.verdict else ""
            yield f"{_named(change.old, fields)} {' '.join(times)} {ratio:>8}{verdict}"
        for result in self.missing:
            yield f"{_named(result, fields)} {'':>28}  missing"
        ratios = [change.ratio for change in self.changes if change.ratio is not None]
        if ratios:
            yield (
                f"geometric mean of new/old over {len(ratios)} shapes {geometric_mean(ratios):.3f}"
            )
        counts = {
            verdict: sum(change.verdict == verdict for change in self.changes)
            for verdict in ("slower", "faster", "failed", "repaired")
        }
        counts["missing"] = len(self.missing)
        yield ", ".join(f"{count} {verdict}" for verdict, count in counts.items())


def _named(result: Result, fields: tuple[str, ...]) -> str:
    return " ".join(f"{result[name]!s:>7}" for name in fields)


def compare(old: dict[str, Any], new: dict[str, Any], tolerance: float = TOLERANCE) -> Comparison:
    """Compares two documents of one operation.

    Args:
        old: what a benchmark wrote before.
        new: what it wrote now. Shapes that only this one has are passed over.
        tolerance: by how much medians may differ, 0.03 for 3%.

    Raises:
        ValueError: the documents are of different operations, or have no shape in common.
    """
    if old["operation"] != new["operation"]:
        raise ValueError(
            f"both results must be of one operation, got {old['operation']} and {new['operation']}"
        )
    operation = OPERATIONS[old["operation"]]
    found = {tuple(result[name] for name in operation.fields): result for result in new["shapes"]}
    changes, missing = [], []
    for result in old["shapes"]:
        key = tuple(result[name] for name in operation.fields)
        if key in found:
            changes.append(Change(result, found[key], tolerance))
        else:
            missing.append(result)
    if not changes:
        raise ValueError("the two results have no shape in common")
    return Comparison(operation, list(_differences(old, new)), changes, missing)


def _differences(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    """What makes times hard to compare, or explains why they differ."""
    for name in ("grid", "dtype", "block_size", "method"):
        if old[name] != new[name]:
            yield f"{name}: {old[name]} before, {new[name]} now"
    for part in ("hardware", "versions"):
        for name in {**old[part], **new[part]}:
            before, now = old[part].get(name), new[part].get(name)
            if before != now:
                yield f"{name}: {before} before, {now} now"
    for name in ("read_gbs", "matmul_tflops"):
        ratio = new["ceilings"][name] / old["ceilings"][name]
        if not 1 / (1 + TOLERANCE) <= ratio <= 1 + TOLERANCE:
            yield f"XLA itself reaches {ratio:.2f} times the {name} of before"
