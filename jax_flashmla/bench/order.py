"""The order in which a long grid is measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def spread(shapes: Sequence[T]) -> tuple[T, ...]:
    """The same shapes, in an order of which any beginning is a fair sample: a run that is cut off
    says something of all kinds."""
    n = len(shapes)
    step = max(1, round(n * 0.618))
    while math.gcd(step, n) > 1:
        step += 1
    return tuple(shapes[i * step % n] for i in range(n))
