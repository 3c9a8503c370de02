"""Weights in the 8 bits that a checkpoint stores, widened where they are used."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Float8:
    """Matrices in e4m3 whose blocks have scales; `w[i].astype(dtype)` as of an array.

    Args:
        values: float8_e4m3fn [..., m, n].
        scales: float32 [..., m / rows of a block, n / columns of a block]; the blocks divide m and
            n, so that devices can share out values and scales alike.
    """

    values: jax.Array
    scales: jax.Array

    @classmethod
    def from_checkpoint(
        cls, values: jax.Array, scales: jax.Array, block: tuple[int, int], share: tuple[int, ...]
    ) -> Float8:
        """With smaller blocks than the checkpoint's where those do not divide a share.

        Args:
            values: [..., m, n].
            scales: [..., ceil(m / block[0]), ceil(n / block[1])].
            block: rows and columns of the checkpoint's blocks, of which the last are cut off.
            share: rows and columns of the part of values that a device has; they divide m and n.
        """
        for axis in (-2, -1):
            size = math.gcd(block[axis], share[axis])
            begins = jnp.arange(0, values.shape[axis], size)
            scales = jnp.take(scales, begins // block[axis], axis=axis)
        return cls(values, scales)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def __getitem__(self, i: int | jax.Array) -> Float8:
        # As bytes: XLA may widen all float8 values before it gathers some of them.
        picked = jax.lax.bitcast_convert_type(self.values, jnp.uint8)[i]
        return Float8(jax.lax.bitcast_convert_type(picked, self.values.dtype), self.scales[i])

    def astype(self, dtype: DTypeLike) -> jax.Array:
        """The weights: products in float32, rounded to dtype."""
        scales = self.scales
        for axis in (-2, -1):
            scales = jnp.repeat(scales, self.shape[axis] // scales.shape[axis], axis=axis)
        return (self.values.astype(jnp.float32) * scales).astype(dtype)
