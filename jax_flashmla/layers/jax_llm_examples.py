"""The latent attention weights of jax-llm-examples (deepseek_r1_jax), as its layer names them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from jax_flashmla import _checks
from jax_flashmla.layers.config import MLAConfig
from jax_flashmla.layers.named_weights import check_weights, split_columns

# What is stored there as it is here.
_SAME = {
    "w_dq": "q_a",
    "q_norm": "q_gamma",
    "w_uq": "q_b",
    "kv_norm": "kv_gamma",
    "w_o": "o",
}


def jax_llm_examples_shapes(config: MLAConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the layer's arrays there."""
    if config.q_lora_rank is None:
        raise ValueError(
            "config must have q_lora_rank, as queries of jax-llm-examples are projected from a "
            "latent, got None"
        )
    hidden, heads, rank = config.hidden_size, config.num_heads, config.kv_lora_rank
    nope, rope = config.qk_nope_head_dim, config.qk_rope_head_dim
    return {
        "q_a": (hidden, config.q_lora_rank),
        "q_gamma": (config.q_lora_rank,),
        "q_b": (config.q_lora_rank, heads, nope + rope),
        "kv_a": (hidden, rank),
        "k_pe": (hidden, rope),
        "kv_gamma": (rank,),
        "k_b": (rank, heads, nope),
        "v_b": (rank, heads, config.v_head_dim),
        "o": (heads, config.v_head_dim, hidden),
    }


def from_jax_llm_examples(config: MLAConfig, layer: Any) -> dict[str, Any]:
    """The fields of MLAParams; see `MLAParams.from_jax_llm_examples`."""
    if config.indexer is not None:
        raise ValueError("config must have no indexer, as jax-llm-examples has none")
    shapes = jax_llm_examples_shapes(config)
    named = layer if isinstance(layer, Mapping) else _attributes(layer, shapes)
    arrays = {name: _dequantise(name, x) for name, x in named.items()}
    check_weights("layer.", arrays, shapes)
    fields = {field: jnp.asarray(arrays[name]) for field, name in _SAME.items()}
    latent, k_rope = jnp.asarray(arrays["kv_a"]), jnp.asarray(arrays["k_pe"])
    return fields | {
        "w_dkv": jnp.concatenate([latent, k_rope.astype(latent.dtype)], axis=1),
        "w_uk": jnp.transpose(jnp.asarray(arrays["k_b"]), (1, 2, 0)),
        "w_uv": jnp.transpose(jnp.asarray(arrays["v_b"]), (1, 2, 0)),
    }


def to_jax_llm_examples(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Arrays by their names there, from the fields of MLAParams."""
    if fields["w_dq"] is None:
        raise ValueError(
            "params must have w_dq, as queries of jax-llm-examples are projected from a latent, "
            "got None"
        )
    if fields["index_w_q"] is not None:
        raise ValueError("params must have no indexer, as jax-llm-examples has none")
    latent, k_rope = split_columns(fields["w_dkv"], fields["kv_norm"].shape[0])
    return {name: fields[field] for field, name in _SAME.items()} | {
        "kv_a": latent,
        "k_pe": k_rope,
        "k_b": jnp.transpose(fields["w_uk"], (2, 0, 1)),
        "v_b": jnp.transpose(fields["w_uv"], (2, 0, 1)),
    }


def _attributes(layer: Any, names: Mapping[str, Any]) -> dict[str, Any]:
    found = {name: getattr(layer, name) for name in names if hasattr(layer, name)}
    if not found:
        raise TypeError(
            "layer must be an AttentionLayer of jax-llm-examples, or a dict of its arrays, got "
            f"{type(layer).__name__}"
        )
    return found


def _dequantise(name: str, x: Any) -> Any:
    """A QuantArray in float32, anything else as it is."""
    if not (hasattr(x, "quant") and hasattr(x, "scale")):
        return x
    # One scale for each input; of the output projection, for each output.
    axis = -1 if name == "o" else 0
    for part, dims in (("quant", "of int8"), ("scale", "of scales")):
        _checks.refuse_foreign(f"layer.{name}.{part}", getattr(x, part), dims)
    if x.quant.ndim < 2 or tuple(x.scale.shape) != (x.quant.shape[axis],):
        raise ValueError(
            f"layer.{name}.scale must have one scale for each of axis {axis} of quant "
            f"{tuple(x.quant.shape)}, got shape {tuple(x.scale.shape)}"
        )
    others = [i for i in range(x.quant.ndim) if i != axis % x.quant.ndim]
    scale = jnp.expand_dims(jnp.asarray(x.scale, jnp.float32), others)
    return jnp.asarray(x.quant, jnp.float32) * scale
