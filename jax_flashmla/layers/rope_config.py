"""What a rotary embedding is: layout, wavelengths, and the extension of its context."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from jax_flashmla import _checks, _limits

LAYOUTS = ("interleaved", "deinterleaved", "half", "none")


def check_number(name: str, value: Any, *, zero: bool = False) -> float:
    """A positive number in float32's range, or 0 where `zero` says so, as a Python float."""
    number = int | float | np.integer | np.floating
    if isinstance(value, bool) or not isinstance(value, number):
        raise TypeError(f"{name} must be a number, got {value!r}")
    in_range = _checks.FLOAT32_TINY <= value <= _checks.FLOAT32_MAX
    if not in_range and not (zero and value == 0):
        raise ValueError(
            f"{name} must be positive{' or 0' if zero else ''} and finite in float32, got {value}"
        )
    return float(value)


def set_numbers(config: Any, prefix: str, names: Iterable[str], *, zero: bool = False) -> None:
    """Checks numbers of a frozen dataclass and stores them as Python floats."""
    for name in names:
        value = check_number(prefix + name, getattr(config, name), zero=zero)
        object.__setattr__(config, name, value)


def longer_context_scale(factor: float, mscale: float) -> float:
    """YaRN's m: 0.1 mscale ln(factor) + 1, and 1 where the context is not longer."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class YarnConfig:
    """YaRN (Peng et al. 2023, arXiv:2309.00071), with DeepSeek's rule for the softmax scale.

    Args:
        factor: how many times longer the context is than `original_max_positions`.
        original_max_positions: tokens of the context before the extension.
        beta_fast: frequencies of more rotations than this within the original context stay.
        beta_slow: frequencies of fewer are divided by `factor`; between the two, a ramp.
        mscale: cos and sin are scaled by m(mscale) / m(mscale_all_dim), where
            m(s) = 0.1 s ln(factor) + 1; by m(1) if either is 0.
        mscale_all_dim: the softmax scale is multiplied by m(mscale_all_dim)^2; not at all if 0.
        attention_factor: the scale of cos and sin, if it is not to be computed.
        truncate: whether the ramp's ends are rounded outwards to whole pairs of columns.

    Raises:
        TypeError, ValueError: a number that is not positive (0 is allowed for the two mscales), not
            finite in float32, or of another type.
    """

    factor: float
    original_max_positions: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    attention_factor: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        set_numbers(self, "yarn.", ("factor", "beta_fast", "beta_slow"))
        set_numbers(self, "yarn.", ("mscale", "mscale_all_dim"), zero=True)
        if self.attention_factor is not None:
            set_numbers(self, "yarn.", ("attention_factor",))
        if not isinstance(self.truncate, bool):
            raise TypeError(f"yarn.truncate must be a bool, got {self.truncate!r}")
        positions = _checks.check_int(
            "yarn.original_max_positions", self.original_max_positions, 1, _limits.INT32_MAX
        )
        object.__setattr__(self, "original_max_positions", positions)
        if self.beta_fast < self.beta_slow:
            raise ValueError(
                f"yarn.beta_fast must be at least beta_slow = {self.beta_slow}, got "
                f"{self.beta_fast}"
            )

    @property
    def rotation_scale(self) -> float:
        """What cos and sin are multiplied by."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._m(self.mscale) / self._m(self.mscale_all_dim)
        return self._m(1.0)

    @property
    def softmax_scale(self) -> float:
        """What the softmax scale is multiplied by."""
        return self._m(self.mscale_all_dim) ** 2 if self.mscale_all_dim else 1.0

    def _m(self, mscale: float) -> float:
        return longer_context_scale(self.factor, mscale)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongRopeConfig:
    """LongRoPE (Ding et al. 2024, arXiv:2402.13753) with one set of factors for all lengths.

    Args:
        factors: what the wavelength of each pair of columns is multiplied by,
            qk_rope_head_dim / 2 numbers; a list is stored as a tuple.
        attention_factor: the scale of cos and sin.
        softmax_scale: what the softmax scale is multiplied by.

    Raises:
        TypeError, ValueError: a number that is not positive, not finite in float32, or of another
            type; factors that are not a tuple or list.
    """

    factors: tuple[float, ...]
    attention_factor: float = 1.0
    softmax_scale: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.factors, tuple | list):
            raise TypeError(f"longrope.factors must be a tuple of numbers, got {self.factors!r}")
        factors = (check_number(f"longrope.factors[{i}]", x) for i, x in enumerate(self.factors))
        object.__setattr__(self, "factors", tuple(factors))
        set_numbers(self, "longrope.", ("attention_factor", "softmax_scale"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """The rotary embedding of the last qk_rope_head_dim columns of queries and keys.

    Args:
        layout: which columns make a pair, and how the rotated ones are stored. "interleaved":
            neighbours, stored as they were (DeepSeek V2). "deinterleaved": neighbours, stored as
            all first ones, then all second ones (DeepSeek V3). "half": column i and i + half,
            stored as they were (MiniCPM3). "none": no rotation (Kimi-Linear). Another pairing is
            another model; between "interleaved" and "deinterleaved" scores are equal, but a cache
            must be of one. Hence there is no default.
        theta: base of the wavelengths, at least 1; more with `yarn`.
        yarn: YaRN's extension of the context, or None.
        longrope: LongRoPE's, or None.

    Raises:
        TypeError, ValueError: a layout that there is not, a theta out of range, or both extensions.
    """

    layout: str
    theta: float = 10000.0
    yarn: YarnConfig | None = None
    longrope: LongRopeConfig | None = None

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise ValueError(f"rope.layout must be one of {LAYOUTS}, got {self.layout!r}")
        set_numbers(self, "rope.", ("theta",))
        for name, kind in (("yarn", YarnConfig), ("longrope", LongRopeConfig)):
            value = getattr(self, name)
            if value is not None and not isinstance(value, kind):
                raise TypeError(f"rope.{name} must be a {kind.__name__} or None, got {value!r}")
        if self.yarn is not None and self.longrope is not None:
            raise ValueError("rope must have yarn or longrope, not both")
        if self.theta < 1 or (self.theta == 1 and self.yarn is not None):
            least = "at least 1" if self.yarn is None else "more than 1, as yarn divides by its log"
            raise ValueError(f"rope.theta must be {least}, got {self.theta}")

    @property
    def rotation_scale(self) -> float:
        """What cos and sin are multiplied by."""
        if self.yarn is not None:
            return self.yarn.rotation_scale
        return 1.0 if self.longrope is None else self.longrope.attention_factor

    @property
    def softmax_scale(self) -> float:
        """What the softmax scale is multiplied by."""
        extension = self.yarn or self.longrope
        return 1.0 if extension is None else extension.softmax_scale
