"""The layer as a Flax linen module."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import linen as nn

from jax_flashmla import PagedCache, Slots, SplitSchedule
from jax_flashmla.layers.absorb import AbsorbedWeights
from jax_flashmla.layers.config import MLAConfig
from jax_flashmla.layers.decode import decode
from jax_flashmla.layers.params import AXES, MLAParams, initializer
from jax_flashmla.layers.prefill import prefill
from jax_flashmla.layers.project import heads_per_device, manual_axis

if TYPE_CHECKING:
    from jax.typing import DTypeLike


class MLAttention(nn.Module):
    """Multi-head latent attention over a paged cache, without the residual and its norm.

    Its parameters have the names and shapes that `MLAParams` lists. Call a method by name:
    `layer.apply(variables, x, cache, slots=slots, method="decode")`.

    Args:
        config: the layer.
        dtype: of the computation; x's by default. The cache has its own.
        param_dtype: of the parameters.
        heads_axis: the mesh axis that splits heads, noted in the parameters' metadata
            (`nn.Partitioned`). Inside a `jax.shard_map` over that axis, the module works on its
            share of the heads, and sums the output over the axis.
    """

    config: MLAConfig
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    heads_axis: str | None = None

    def setup(self) -> None:
        num_heads = heads_per_device(self.config, manual_axis(self.heads_axis))
        shapes = MLAParams.shapes(dataclasses.replace(self.config, num_heads=num_heads))
        specs = MLAParams.specs(self.config, self.heads_axis)
        arrays = {}
        for name in AXES:
            shape = getattr(shapes, name)
            if shape is not None:
                init: Callable = initializer(name)
                if self.heads_axis is not None:
                    init = nn.with_partitioning(init, tuple(getattr(specs, name)))
                arrays[name] = self.param(name, init, shape.shape, self.param_dtype)
        self.arrays = MLAParams(**arrays)

    def decode(
        self,
        x: jax.Array,
        cache: PagedCache,
        *,
        slots: Slots,
        layer: int | jax.Array | None = None,
        schedule: SplitSchedule | None = None,
        absorbed: AbsorbedWeights | None = None,
        implementation: str | None = None,
    ) -> tuple[PagedCache, jax.Array]:
        """A few new tokens per sequence: see `jax_flashmla.layers.decode`."""
        return decode(
            self.config,
            self.arrays,
            x if self.dtype is None else x.astype(self.dtype),
            cache,
            slots=slots,
            layer=layer,
            schedule=schedule,
            absorbed=absorbed,
            heads_axis=manual_axis(self.heads_axis),
            implementation=implementation,
        )

    def prefill(
        self,
        x: jax.Array,
        cache: PagedCache,
        *,
        slots: Slots,
        layer: int | jax.Array | None = None,
        prefix: bool = True,
        implementation: str | None = None,
    ) -> tuple[PagedCache, jax.Array]:
        """A prompt or a chunk of it: see `jax_flashmla.layers.prefill`."""
        return prefill(
            self.config,
            self.arrays,
            x if self.dtype is None else x.astype(self.dtype),
            cache,
            slots=slots,
            layer=layer,
            prefix=prefix,
            heads_axis=manual_axis(self.heads_axis),
            implementation=implementation,
        )
