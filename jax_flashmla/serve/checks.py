"""Rules on what a server is given, so that nothing that a step cannot do reaches a step."""

from __future__ import annotations

import numbers
from collections.abc import Iterable
from typing import Any

import numpy as np

from jax_flashmla._limits import INT32_MAX
from jax_flashmla.cache.allocator import as_integer


def at_least(least: int, name: str, value: Any) -> int:
    """An integer that is no less, else TypeError or ValueError."""
    value = as_integer(name, value)
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return value


def check_real(name: str, value: Any) -> None:
    """TypeError for what is no number."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r}")


def token_ids(name: str, tokens: Any) -> list[int]:
    """Token ids, or an array [n] of them, as Python's integers.

    TypeError for what is none, ValueError for what is negative or past int32.
    """
    if isinstance(tokens, str | bytes) or not isinstance(tokens, Iterable):
        raise TypeError(f"{name} must be token ids, such as [1, 2, 3], got {tokens!r}")
    if not hasattr(tokens, "__array__"):
        tokens = list(tokens)
        for token in tokens:
            at_least(0, f"each of {name}", token)
    if not len(tokens):
        return []
    ids = np.asarray(tokens)  # of objects where one is past 64 bits
    if ids.ndim != 1 or ids.dtype.kind not in "iuO":
        raise TypeError(f"{name} must be integers [n], got {ids.dtype} {list(ids.shape)}")
    if ids.min() < 0 or ids.max() > INT32_MAX:
        wrong = next(int(i) for i in ids if not 0 <= i <= INT32_MAX)
        raise ValueError(f"{name} must be between 0 and {INT32_MAX}, got {wrong}")
    return ids.tolist()


def strings(name: str, values: Any) -> tuple[str, ...]:
    """Strings that are not empty, else ValueError."""
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise ValueError(f"{name} must be non-empty strings, got {values!r}")
    values = tuple(values)
    if not all(isinstance(value, str) and value for value in values):
        raise ValueError(f"{name} must be non-empty strings, got {values!r}")
    return values
