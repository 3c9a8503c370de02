"""The model over several devices of one host: each has a share of all heads and of all MLPs.

Weights are split so that a layer's attention and its MLP each end in one sum over the devices. What
is small is the same on all of them, and so is the cache: a row of it serves all heads.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from deepseek.config import ModelConfig
from deepseek.float8 import Float8
from jax_flashmla import Peers, connect_peers
from jax_flashmla.layers import MLAParams


def connect(count: int, config: ModelConfig) -> Peers | None:
    """The first `count` devices beside JAX's default one, connected where they can be.

    None for one.

    Raises:
        ValueError: there are fewer devices, or the model cannot be split over so many.
    """
    devices = jax.local_devices(backend=jnp.zeros(()).device.platform)
    if not 1 <= count <= len(devices):
        raise ValueError(
            f"--devices must be between 1 and the {len(devices)} {devices[0].platform} devices "
            f"that there are, got {count}"
        )
    split = {"num_attention_heads": config.attention.num_heads}
    if None in config.moe:
        split["intermediate_size"] = config.intermediate_size
    for moe in config.moe:
        if moe is not None:
            split["moe_intermediate_size"] = moe.intermediate_size
            split["the width of shared experts"] = moe.shared_size
    uneven = [f"{name} = {size}" for name, size in split.items() if size % count]
    if uneven:
        raise ValueError(f"--devices must divide the model's {', '.join(uneven)}, got {count}")
    if count == 1:
        return None
    mesh = jax.make_mesh((count,), ("model",), devices=devices[:count], axis_types=(AxisType.Auto,))
    return connect_peers(mesh, "model")


def everywhere(peers: Peers) -> NamedSharding:
    """The same on each device."""
    return NamedSharding(peers.mesh, P())


def share(
    config: ModelConfig, peers: Peers | None, path: tuple[Any, ...], shape: tuple[int, ...]
) -> tuple[int, ...]:
    """The shape of what each device has of a parameter."""
    return shape if peers is None else _sharding(config, peers, path, shape).shard_shape(shape)


def place(
    config: ModelConfig, peers: Peers | None, path: tuple[Any, ...], x: jax.Array | Float8
) -> jax.Array | Float8:
    """A parameter, or each device's share of it; path is where it is in the model."""
    return x if peers is None else jax.device_put(x, _sharding(config, peers, path, x.shape))


def _sharding(
    config: ModelConfig, peers: Peers, path: tuple[Any, ...], shape: tuple[int, ...]
) -> NamedSharding:
    return NamedSharding(peers.mesh, _spec(config, peers, path, shape))


def _spec(config: ModelConfig, peers: Peers, path: tuple[Any, ...], shape: tuple[int, ...]) -> P:
    axis = peers.axis
    if "self_attn" in path:
        attention = config.attention.for_layer(path[path.index("layers") + 1])
        return getattr(MLAParams.specs(attention, axis), path[-1])
    if "gate_proj" in path or "up_proj" in path:  # [.., hidden, width]
        return P(*[None] * (len(shape) - 1), axis)
    if "down_proj" in path:  # [.., width, hidden]
        return P(*[None] * (len(shape) - 2), axis, None)
    if "lm_head" in path and shape[-1] % peers.size == 0:  # [hidden, vocab]
        return P(None, axis)
    return P()
