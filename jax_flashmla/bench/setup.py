"""What all shapes of a run have in common."""

from __future__ import annotations

from dataclasses import dataclass

import jax

from jax_flashmla.bench.limits import Limits
from jax_flashmla.bench.measure import Method
from jax_flashmla.bench.shape import Shape


@dataclass(frozen=True)
class Setup:
    """Device, method, limits, and what the options choose."""

    device: jax.Device
    method: Method
    limits: Limits
    dtype: str
    block_size: int
    look_inside: bool  # whether to find out how the calls are launched

    def caches(self, shape: Shape) -> int:
        """Caches that one jitted function reads."""
        return self.method.caches(shape.cache_bytes, self.limits.us(shape))

    def calls(self, shape: Shape) -> int:
        """Calls in one jitted function, over its caches in turn."""
        caches = self.caches(shape)
        return caches * self.method.rounds(caches, self.limits.us(shape))
