"""The layer as a Flax nnx module."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

try:
    from flax import nnx
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "jax_flashmla.layers.nnx needs the package flax: pip install 'jax-flashmla[flax]'"
    ) from error

from jax_flashmla import Peers
from jax_flashmla.layers.calls import MLACalls, check_module
from jax_flashmla.layers.config import MLAConfig
from jax_flashmla.layers.params import AXES, MLAParams, check_params, stored_dtype

if TYPE_CHECKING:
    from jax.typing import DTypeLike


class MLAttention(MLACalls, nnx.Module):
    """Multi-head latent attention over a paged cache, without the residual and its norm.

    Its parameters are `nnx.Param`s of the names and shapes that `MLAParams` lists.

    Args:
        config: the layer.
        dtype: of the computation; x's by default. The cache has its own.
        param_dtype: of the parameters.
        heads_axis: the mesh axis that splits heads, noted in the parameters' metadata. Inside a
            `jax.shard_map` over that axis, the module works on its share of the heads, and sums the
            output over the axis. By default nnx wants a mesh with that axis when it creates them
            (`jax.set_mesh`), and shards them, given ones too: see `nnx.use_eager_sharding`.
        peers: from `connect_peers(mesh, heads_axis)`, what `decode` sums over the axis with.
        params: parameters to start from, as from a checkpoint, instead of random ones.
        rngs: its `params` stream is what random parameters are drawn from.

    Raises:
        TypeError: an argument of another type, or a dtype that is not floating.
        ValueError: params that do not fit config, or neither params nor rngs.
    """

    def __init__(
        self,
        config: MLAConfig,
        *,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        heads_axis: str | None = None,
        peers: Peers | None = None,
        params: MLAParams | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> None:
        check_module(config, dtype, param_dtype, heads_axis, peers)
        self.config, self.dtype = config, dtype
        self.heads_axis, self.peers = heads_axis, peers
        specs = MLAParams.specs(config, heads_axis)
        if params is not None:
            check_params(config, params, config.num_heads)
        elif isinstance(rngs, nnx.Rngs):
            params = MLAParams.init(config, rngs.params(), param_dtype)
        elif rngs is None:
            raise ValueError("MLAttention must be given params or rngs")
        else:
            raise TypeError(f"rngs must be an nnx.Rngs or None, got {type(rngs).__name__}")
        for name in AXES:
            array = getattr(params, name)
            if array is not None:
                spec = None if heads_axis is None else getattr(specs, name)
                if spec is not None and nnx.using_eager_sharding():
                    array = _move(array, spec, heads_axis)
                value = array.astype(stored_dtype(name, param_dtype))
                setattr(self, name, nnx.Param(value, out_sharding=spec))

    @property
    def params(self) -> MLAParams:
        """The parameters' arrays, as the functions of `jax_flashmla.layers` take them."""
        arrays = {name: getattr(self, name)[...] for name in AXES if hasattr(self, name)}
        return MLAParams(**arrays)


def _move(array: jax.Array, spec: PartitionSpec, axis: str | None) -> jax.Array:
    """To the devices of a mesh in context that has the axis: nnx takes what is on them already.

    What is traced has no devices, and under vmap one axis more than the spec.
    """
    has_axis = axis in jax.sharding.get_abstract_mesh().axis_names
    traced = isinstance(array, jax.core.Tracer)
    return jax.device_put(array, spec) if has_axis and not traced else array
