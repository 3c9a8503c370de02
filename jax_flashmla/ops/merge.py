"""Combining attention over parts of the keys into attention over all of them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from jax_flashmla import _checks

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Float32


def merge_lse(
    outs: Float[Array, ...] | Sequence[Float[Array, ...]],
    lses: Float32[Array, ...] | Sequence[Float32[Array, ...]],
    axis: int = 0,
) -> tuple[Float[Array, ...], Float32[Array, ...]]:
    """Merges partial attentions, each over its own keys, as if over all the keys at once.

    A part with nothing to attend (lse = -inf) has no influence, whatever its out holds. Merging is
    associative and commutative up to rounding. Differentiable.

    Args:
        outs: the parts' outputs: one array with the parts along `axis`, [n_parts, ..., d_v] for
            axis 0; or a list or tuple of arrays [..., d_v] of one dtype.
        lses: float32 natural logs, likewise, [n_parts, ...] or a list or tuple of arrays [...].
        axis: the axis of lses, and of outs, along which the parts lie; not negative. Of no matter
            for a list.

    Returns:
        out: [..., d_v] in outs' dtype; 0 where every part is empty.
        lse: [...] float32; -inf where every part is empty.

    Raises:
        TypeError, ValueError: an argument is not as described.
    """
    outs, lses = _parts_first("outs", outs, axis), _parts_first("lses", lses, axis)
    if not jnp.issubdtype(outs.dtype, jnp.floating):
        raise TypeError(f"outs must have a floating dtype, got {outs.dtype}")
    if lses.dtype != jnp.float32:
        raise TypeError(f"lses must have dtype float32, got {lses.dtype}")
    if outs.shape[:-1] != lses.shape:
        raise ValueError(
            "lses must have outs' shape less its last axis, parts first "
            f"{outs.shape[:-1]}, got {lses.shape}"
        )

    return _merge(outs, lses)


@functools.partial(jax.jit, inline=True)  # one kernel, not one an operation, also outside of jit
def _merge(outs: jax.Array, lses: jax.Array) -> tuple[jax.Array, jax.Array]:
    empty = lses == -jnp.inf
    top = jax.lax.stop_gradient(jnp.max(lses, axis=0, keepdims=True))
    weights = jnp.exp(lses - jnp.where(top == -jnp.inf, 0.0, top))
    total = jnp.sum(weights, axis=0, keepdims=True)
    nothing = total == 0
    total = jnp.where(nothing, 1.0, total)
    lse = jnp.where(nothing, -jnp.inf, top + jnp.log(total))
    parts = jnp.where(empty[..., None], 0.0, outs.astype(jnp.float32))
    out = jnp.sum(parts * (weights / total)[..., None], axis=0)
    return out.astype(outs.dtype), lse[0]


def _parts_first(name: str, parts: Any, axis: int) -> jax.Array:
    """[n_parts, ...]."""
    if isinstance(parts, list | tuple):
        for i, part in enumerate(parts):
            _checks.refuse_foreign(f"{name}[{i}]", part, "[...]")
            _checks.refuse_deleted(f"{name}[{i}]", part)
        for what, got in (
            ("shape", {part.shape for part in parts}),
            ("dtype", {part.dtype.name for part in parts}),
        ):
            if len(got) != 1:
                raise ValueError(
                    f"{name} must be at least one part, all of one {what}, got {what}s "
                    f"{sorted(got)}"
                )
        return jnp.stack(parts)
    _checks.refuse_foreign(name, parts, "[n_parts, ...] or a list of them [...]")
    _checks.refuse_deleted(name, parts)
    if parts.ndim == 0:
        raise ValueError(f"{name} must be [n_parts, ...], got shape ()")
    axis = _checks.check_int(f"axis of {name}", axis, 0, parts.ndim - 1)
    if parts.shape[axis] == 0:
        raise ValueError(
            f"{name} must have at least one part along axis {axis}, got shape {parts.shape}"
        )
    return jnp.moveaxis(parts, axis, 0)
