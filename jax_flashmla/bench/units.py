"""Numbers with units of their size: 3.2 GFLOP/s rather than 0.0032 TFLOP/s."""

from __future__ import annotations

import math
from collections.abc import Iterable

PREFIXES = {-2: "u", -1: "m", 0: "", 1: "k", 2: "M", 3: "G", 4: "T", 5: "P"}  # powers of 1000


def scale_for(values: Iterable[float], unit: str) -> tuple[float, str]:
    """What to divide all the values by so that the greatest is from 1 to 999, and their unit.

    Args:
        values: in the unit; those that are not positive and finite do not count.
        unit: such as "FLOP/s".
    """
    greatest = max((v for v in values if 0 < v < math.inf), default=1.0)
    power = min(max(math.floor(math.log10(greatest) / 3 + 1e-9), min(PREFIXES)), max(PREFIXES))
    return 1000.0**power, PREFIXES[power] + unit


def with_unit(value: float, unit: str) -> str:
    """Such as "4.58 TB/s"; three digits."""
    scale, name = scale_for([value], unit)
    return f"{value / scale:.3g} {name}"
