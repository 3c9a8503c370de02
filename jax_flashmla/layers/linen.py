"""The layer as a Flax linen module."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax.numpy as jnp

try:
    from flax import linen as nn
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "jax_flashmla.layers.linen needs the package flax: pip install 'jax-flashmla[flax]'"
    ) from error

from jax_flashmla import Peers
from jax_flashmla.layers.calls import MLACalls, check_module
from jax_flashmla.layers.config import MLAConfig
from jax_flashmla.layers.params import AXES, MLAParams, initializer, stored_dtype
from jax_flashmla.layers.project import heads_per_device, manual_axis

if TYPE_CHECKING:
    from jax.typing import DTypeLike


class MLAttention(MLACalls, nn.Module):
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
        peers: from `connect_peers(mesh, heads_axis)`, what `decode` sums over the axis with.

    Raises:
        TypeError: an attribute of another type, or a dtype that is not floating; when it is called.
    """

    config: MLAConfig
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    heads_axis: str | None = None
    peers: Peers | None = None

    def setup(self) -> None:
        check_module(self.config, self.dtype, self.param_dtype, self.heads_axis, self.peers)
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
                arrays[name] = self.param(
                    name, init, shape.shape, stored_dtype(name, self.param_dtype)
                )
        self.arrays = MLAParams(**arrays)

    @property
    def params(self) -> MLAParams:
        """The parameters' arrays, as the functions of `jax_flashmla.layers` take them."""
        return self.arrays
