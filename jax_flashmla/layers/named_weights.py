"""Weights in another project's layout: each array by its name there, held against its shape."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jax_flashmla import _checks


def check_weights(
    where: str, weights: Mapping[str, Any], expected: Mapping[str, tuple[int, ...]]
) -> None:
    """That they are arrays, and exactly the expected ones.

    Raises:
        TypeError: one is no array.
        ValueError: it names every one that is missing, extra or misshapen.
    """
    for name in weights.keys() & expected.keys():
        _checks.refuse_foreign(f"{where}{name}", weights[name], str(list(expected[name])))
    wrong = [f"{name} is missing" for name in expected if name not in weights]
    wrong += [f"{name} is not one of this layer's" for name in weights if name not in expected]
    for name, shape in expected.items():
        if name in weights and tuple(weights[name].shape) != shape:
            wrong.append(f"{name} must be {shape}, got {tuple(weights[name].shape)}")
    if wrong:
        raise ValueError(f"{where.rstrip('.')}: {'; '.join(wrong)}")


def split_columns(weight: Any, width: int) -> tuple[jax.Array, jax.Array]:
    """The first `width` columns, and the others."""
    first, second = jnp.split(jnp.asarray(weight), [width], axis=-1)
    return first, second
