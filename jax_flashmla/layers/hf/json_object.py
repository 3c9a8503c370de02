"""Objects of JSON files, whose values are read with their type and range checked."""

from __future__ import annotations

import json
import math
import pathlib
import reprlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jax_flashmla import _checks, _limits

REQUIRED: Any = object()  # the default of a key that must be there


class JsonObject:
    """A JSON object and where it stands, for messages. A null counts as an absent key.

    Args:
        values: the object.
        where: its file, or what else the user knows it by.
        path: keys that lead to it within the file, each followed by a full stop.
    """

    def __init__(self, values: Mapping[str, Any], where: str, path: str = ""):
        self.values, self.where, self.path = values, where, path

    def __iter__(self) -> Iterator[str]:
        """The keys, nulls' included."""
        return iter(self.values)

    def get(self, key: str, default: Any = None) -> Any:
        """The value as it is.

        Raises:
            ValueError: it is required, and absent or null.
        """
        value = self.values.get(key)
        if value is not None:
            return value
        if default is not REQUIRED:
            return default
        if key in self.values:
            raise self.error(key, "must not be null")
        keys = describe(sorted(map(str, self.values)))
        raise ValueError(f"{self.where}: {self.path}{key} must be there, got the keys {keys}")

    def integer(self, key: str, default: Any = REQUIRED, *, least: int = 1) -> Any:
        """An integer between `least` and 2^31 - 1; also as a float without a fraction."""
        value = self.get(key, default)
        if value is default:
            return value
        as_int = to_int(value)
        if as_int is None or not least <= as_int <= _limits.INT32_MAX:
            raise self.error(key, f"must be an integer between {least} and 2^31 - 1", value)
        return as_int

    def number(self, key: str, default: Any = REQUIRED, *, zero: bool = False) -> Any:
        """A positive number in float32's range; 0 where `zero` says so."""
        value = self.get(key, default)
        if value is default or (zero and _is_number(value) and value == 0):
            return value
        if not _is_positive(value):
            raise self.error(key, f"must be a number {_POSITIVE}{' or 0' if zero else ''}", value)
        return float(value)

    def numbers(self, key: str) -> tuple[float, ...]:
        """A list of positive numbers in float32's range."""
        value = self.get(key, REQUIRED)
        if not isinstance(value, list | tuple):
            raise self.error(key, "must be a list of numbers", value)
        for i, x in enumerate(value):
            if not _is_positive(x):
                raise self.error(f"{key}[{i}]", f"must be a number {_POSITIVE}", x)
        return tuple(map(float, value))

    def boolean(self, key: str, default: bool) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.error(key, "must be true or false", value)
        return value

    def string(self, key: str, default: Any = REQUIRED) -> Any:
        value = self.get(key, default)
        if value is not default and not isinstance(value, str):
            raise self.error(key, "must be a string", value)
        return value

    def strings(self, key: str) -> list[str]:
        """A list of strings; empty if absent."""
        value = self.get(key, [])
        if not isinstance(value, list | tuple) or not all(isinstance(x, str) for x in value):
            raise self.error(key, "must be a list of strings", value)
        return list(value)

    def object(self, key: str, default: Any = None) -> JsonObject:
        """An object within this one; an empty one if absent."""
        value = self.get(key, default)
        if value is None:
            value = {}
        if not isinstance(value, Mapping):
            raise self.error(key, "must be an object", value)
        return JsonObject(value, self.where, f"{self.path}{key}.")

    def error(self, key: str, rule: str, *got: Any) -> ValueError:
        said = f", got {describe(got[0])}" if got else ""
        return ValueError(f"{self.where}: {self.path}{key} {rule}{said}")


def read_json(path: pathlib.Path) -> JsonObject:
    """The object that a JSON file is.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not JSON, or not an object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must be a JSON object, got {describe(values)}")
    return JsonObject(values, str(path))


def to_int(value: Any) -> int | None:
    """The integer that a JSON number is; None where it is not one."""
    if isinstance(value, bool) or not _is_number(value):
        return None
    if isinstance(value, int | np.integer):
        return int(value)
    return int(value) if math.isfinite(value) and value == int(value) else None


def describe(value: Any) -> str:
    """The value as JSON has it, shortened, however deep or long it is."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return reprlib.repr(value)


_POSITIVE = f"between {_checks.FLOAT32_TINY:.3g} and {_checks.FLOAT32_MAX:.3g}"


def _is_number(value: Any) -> bool:
    number = int | float | np.integer | np.floating
    return isinstance(value, number) and not isinstance(value, bool)


def _is_positive(value: Any) -> bool:
    return _is_number(value) and _checks.FLOAT32_TINY <= value <= _checks.FLOAT32_MAX
