"""From a Hugging Face config.json to an MLAConfig.

The rules are those of transformers' own models, release 5. Where a key's name has changed over the
releases (rope_scaling became rope_parameters, which took rope_theta in), both are read.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from jax_flashmla.layers.config import LongRopeConfig, MLAConfig, RopeConfig, YarnConfig

# How each model rotates; None where the key rope_interleave decides.
_LAYOUTS = {
    "deepseek_v2": "interleaved",
    "deepseek_v3": None,
    "deepseek_v32": "deinterleaved",
    "kimi_k2": None,
    "glm4_moe_lite": None,
    "longcat_flash": "deinterleaved",
    "minicpm3": "half",
}
_DEFAULT_THETA = {"longcat_flash": 1e7}
_OTHER_MODELS = {
    "glm_moe_dsa": "its attention is sparse, chosen by an indexer",
    "kimi_linear": "most of its layers are linear attention; build an MLAConfig by hand for the "
    'others, with rope.layout "none"',
}


def read_hf_config(config: Mapping[str, Any] | str | os.PathLike[str]) -> MLAConfig:
    """See `MLAConfig.from_hf`."""
    hf = _load(config)
    model_type = _required(hf, "model_type")
    if model_type not in _LAYOUTS:
        reason = _OTHER_MODELS.get(model_type)
        if reason is None and "text_config" in hf:
            reason = 'it wraps a language model: pass config["text_config"]'
        raise NotImplementedError(
            f"model_type must be one of {sorted(_LAYOUTS)}, got {model_type!r}"
            + (f": {reason}" if reason else "")
        )
    if hf.get("attention_bias"):
        raise NotImplementedError(
            "attention_bias must be false: no published model with latent attention has biases, "
            f"got {hf['attention_bias']!r}"
        )

    hidden_size, num_heads = _required(hf, "hidden_size"), _required(hf, "num_attention_heads")
    q_lora_rank, kv_lora_rank = _required(hf, "q_lora_rank"), _required(hf, "kv_lora_rank")
    v_head_dim = hf.get("v_head_dim")
    if v_head_dim is None:
        if model_type != "minicpm3":
            _required(hf, "v_head_dim")
        v_head_dim = hidden_size // num_heads
    q_scale = kv_scale = 1.0
    if model_type == "longcat_flash":
        # The published config has these two as flags; transformers takes them as set.
        if hf.get("mla_scale_q_lora", True):
            q_scale = math.sqrt(hidden_size / q_lora_rank)
        if hf.get("mla_scale_kv_lora", True):
            kv_scale = math.sqrt(hidden_size / kv_lora_rank)
    # The latent norms' epsilon is 1e-6 in every model, whatever rms_norm_eps says.
    return MLAConfig(
        hidden_size=hidden_size,
        num_heads=num_heads,
        q_lora_rank=q_lora_rank,
        kv_lora_rank=kv_lora_rank,
        qk_nope_head_dim=_required(hf, "qk_nope_head_dim"),
        qk_rope_head_dim=_required(hf, "qk_rope_head_dim"),
        v_head_dim=v_head_dim,
        rope=_read_rope(hf, model_type),
        q_scale=q_scale,
        kv_scale=kv_scale,
    )


def _load(config: Mapping[str, Any] | str | os.PathLike[str]) -> Mapping[str, Any]:
    if isinstance(config, Mapping):
        return config
    if not isinstance(config, str | os.PathLike):
        raise TypeError(
            f"config must be a dict, a config.json or its folder, got {type(config).__name__}"
        )
    path = pathlib.Path(config)
    if path.is_dir():
        path /= "config.json"
    try:
        hf = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"config must be JSON, got {path} with {error}") from error
    if not isinstance(hf, dict):
        raise ValueError(f"config must be a JSON object, got {path} with a {type(hf).__name__}")
    return hf


def _required(hf: Mapping[str, Any], key: str) -> Any:
    if key not in hf or (hf[key] is None and key != "q_lora_rank"):
        raise ValueError(f"config must have the key {key}, got only {sorted(hf)}")
    return hf[key]


def _read_rope(hf: Mapping[str, Any], model_type: str) -> RopeConfig:
    parameters = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    if any(isinstance(value, Mapping) for value in parameters.values()):
        raise NotImplementedError(
            "rope_parameters must be the same for all layers, got them by layer type: "
            f"{sorted(parameters)}"
        )
    theta = parameters.get("rope_theta", hf.get("rope_theta"))
    if theta is None:
        theta = _DEFAULT_THETA.get(model_type, 10000.0)
    partial = parameters.get("partial_rotary_factor", hf.get("partial_rotary_factor"))
    if partial is not None and partial != 1:
        raise NotImplementedError(
            f"partial_rotary_factor must be 1: qk_rope_head_dim says what rotates, got {partial}"
        )
    layout = _LAYOUTS[model_type]
    if layout is None:
        layout = "deinterleaved" if hf.get("rope_interleave", True) else "half"

    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        return RopeConfig(layout=layout, theta=theta)
    if kind == "yarn":
        return RopeConfig(layout=layout, theta=theta, yarn=_read_yarn(hf, parameters))
    if kind == "longrope":
        return RopeConfig(layout=layout, theta=theta, longrope=_read_longrope(hf, parameters))
    raise NotImplementedError(
        f"rope_type must be default, yarn or longrope, got {kind!r}: no published model with "
        "latent attention has another"
    )


def _read_yarn(hf: Mapping[str, Any], parameters: Mapping[str, Any]) -> YarnConfig:
    original = _original_positions(hf, parameters)
    factor = parameters.get("factor")
    return YarnConfig(
        factor=_required(hf, "max_position_embeddings") / original if factor is None else factor,
        original_max_positions=original,
        beta_fast=parameters.get("beta_fast") or 32.0,
        beta_slow=parameters.get("beta_slow") or 1.0,
        mscale=parameters.get("mscale") or 0.0,
        mscale_all_dim=parameters.get("mscale_all_dim") or 0.0,
        attention_factor=parameters.get("attention_factor"),
        truncate=parameters.get("truncate", True),
    )


def _read_longrope(hf: Mapping[str, Any], parameters: Mapping[str, Any]) -> LongRopeConfig:
    original = _original_positions(hf, parameters)
    longest = _required(hf, "max_position_embeddings")
    short, long = _required(parameters, "short_factor"), _required(parameters, "long_factor")
    if longest > original and list(short) != list(long):
        raise NotImplementedError(
            f"long_factor must be short_factor where max_position_embeddings = {longest} is more "
            f"than original_max_position_embeddings = {original}: other factors past {original} "
            "tokens would ask for other keys than the cache holds. Set max_position_embeddings to "
            f"{original}, or build a LongRopeConfig with the factors to use throughout"
        )
    factor = parameters.get("factor")
    if factor is None:
        factor = longest / original
    attention_factor = parameters.get("attention_factor")
    if attention_factor is None:
        attention_factor = math.sqrt(1 + math.log(max(factor, 1)) / math.log(original))
    return LongRopeConfig(factors=tuple(short), attention_factor=attention_factor)


def _original_positions(hf: Mapping[str, Any], parameters: Mapping[str, Any]) -> int:
    for source in (hf, parameters):
        original = source.get("original_max_position_embeddings")
        if original is not None:
            return original
    return _required(hf, "max_position_embeddings")
