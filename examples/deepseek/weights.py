"""From a checkpoint to a model."""

from __future__ import annotations

import dataclasses
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from deepseek.config import ModelConfig
from deepseek.devices import place, share
from deepseek.float8 import Float8
from deepseek.model import DeepSeek
from jax_flashmla import Peers
from jax_flashmla.layers.checkpoint import (
    attention_prefix,
    attention_shapes,
    load_attention,
    track,
)
from jax_flashmla.layers.tensor_reader import TensorReader

Path = tuple[Any, ...]  # of a parameter in the model


def load_model(
    directory: pathlib.Path,
    config: ModelConfig,
    *,
    dtype: DTypeLike,
    peers: Peers | None = None,
    progress: bool = False,
) -> DeepSeek:
    """The model with the weights of a Hugging Face directory, on JAX's default device or on peers.

    Tensors are read to the default device, one parameter at a time, and go from there to theirs.

    Raises:
        FileNotFoundError: there are no weights.
        ValueError: names every tensor that is missing, extra or misshapen.
    """
    reader = TensorReader(directory)
    with nnx.use_eager_sharding(False):  # `place` does it
        model = nnx.eval_shape(lambda: DeepSeek(config, dtype=dtype, rngs=nnx.Rngs(0), peers=peers))
    graph, state = nnx.split(model)
    parameters = {
        path: parameter for path, parameter in nnx.to_flat_state(state) if "self_attn" not in path
    }
    prefix = attention_prefix(reader)
    expected = {
        f"{prefix}layers.{i}.self_attn.{name}": shape
        for i in range(config.num_layers)
        for name, shape in attention_shapes(config.attention.for_layer(i)).items()
    }
    for path, parameter in parameters.items():
        shape = parameter.get_value().shape
        for name in tensor_names(path, shape, prefix):
            expected[name] = _stored_shape(path, shape)
    within = re.escape(prefix.removesuffix("model."))  # other models beside it are not loaded
    reader.check(expected, within=within, ignore=_unused(config, prefix))

    for path, parameter in track(list(parameters.items()), "weights", progress):
        abstract = parameter.get_value()
        names = tensor_names(path, abstract.shape, prefix)
        of_device = share(config, peers, path, abstract.shape)
        value = _read(reader, names, path, abstract.dtype, of_device)
        parameter.set_value(place(config, peers, path, value))
    layers = range(config.num_layers)
    loaded = load_attention(
        reader, config.attention, layers, dtype=dtype, prefix=prefix, progress=progress
    )
    for i, params in zip(layers, loaded, strict=True):
        for field in dataclasses.fields(params):
            path, value = ("layers", i, "self_attn", field.name), getattr(params, field.name)
            if value is not None:
                parameter = state["layers"][i]["self_attn"][field.name]
                parameter.set_value(place(config, peers, path, value))
    return nnx.merge(graph, state)


def _read(
    reader: TensorReader, names: list[str], path: Path, dtype: DTypeLike, share: tuple[int, ...]
) -> jax.Array | Float8:
    """A parameter from its tensors; an MLP's or experts' that are stored in float8 stay in it."""
    all_float8 = all(reader.stored(name).dtype == "F8_E4M3" for name in names)

    def read(name: str) -> jax.Array | Float8:
        if all_float8 and _is_projection(path):
            values, scales = (x.T for x in reader.read_float8(name))
            return Float8.from_checkpoint(values, scales, reader.block_size[::-1], share[-2:])
        x = reader.read(name, dtype)
        return x.T if _is_transposed(path) else x

    tensors = [read(name) for name in names]
    return jax.tree.map(lambda *x: jnp.stack(x), *tensors) if _is_stacked(path) else tensors[0]


def tensor_names(path: Path, shape: tuple[int, ...], prefix: str = "model.") -> list[str]:
    """The tensors that a parameter is made of: one, or one for each expert.

    Layers' names begin with the prefix; the head is beside what it leads to.
    """
    *parents, leaf = path
    before = prefix.removesuffix("model.") if parents[0] == "lm_head" else prefix
    module = before + ".".join(map(str, parents))
    if _is_stacked(path):
        return [f"{module}.{expert}.{leaf}.weight" for expert in range(shape[0])]
    if _is_projection(path):
        return [f"{module}.{leaf}.weight"]
    return [f"{module}." + {"kernel": "weight", "embedding": "weight"}.get(leaf, leaf)]


def _stored_shape(path: Path, shape: tuple[int, ...]) -> tuple[int, ...]:
    shape = shape[1:] if _is_stacked(path) else shape
    return shape[::-1] if _is_transposed(path) else shape


def _is_projection(path: Path) -> bool:
    """Whether it is a matrix of an MLP, or those of all experts."""
    return path[-1] in ("gate_proj", "up_proj", "down_proj")


def _is_stacked(path: Path) -> bool:
    return "experts" in path


def _is_transposed(path: Path) -> bool:
    """Whether a checkpoint stores its outputs first."""
    return _is_projection(path) or path[-1] == "kernel"


def _unused(config: ModelConfig, prefix: str) -> str:
    """Matches the names of what a checkpoint may have and the model does not use.

    Layers past the last one predict several tokens ahead (V3); rotary frequencies are computed.
    """
    own_layers = "|".join(map(str, range(config.num_layers)))
    later_layers = rf"{re.escape(prefix)}layers\.(?!(?:{own_layers})\.)"
    head = prefix.removesuffix("model.") + "lm_head.weight"
    tied_head = "|" + re.escape(head) if config.tied_embeddings else ""
    return rf"{later_layers}|.*\.rotary_emb\.inv_freq$" + tied_head
