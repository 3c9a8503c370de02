"""From a Hugging Face config.json to the fields of an MLAConfig.

The rules are those of transformers' own models, release 5.
"""

from __future__ import annotations

import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from jax_flashmla.layers.hf.indexer import read_indexer
from jax_flashmla.layers.hf.json_object import JsonObject, describe, read_json
from jax_flashmla.layers.hf.refused_keys import refuse_other_attention
from jax_flashmla.layers.hf.rope import LAYOUTS, read_rope

MODEL_TYPES = sorted(LAYOUTS)
_ARCHITECTURES = {
    "AXK1ForCausalLM": "axk1",
    "DeepseekV2ForCausalLM": "deepseek_v2",
    "DeepseekV3ForCausalLM": "deepseek_v3",
    "DeepseekV32ForCausalLM": "deepseek_v32",
    "GlmMoeDsaForCausalLM": "glm_moe_dsa",
    "Glm4MoeLiteForCausalLM": "glm4_moe_lite",
    "LongcatFlashForCausalLM": "longcat_flash",
    "MiniCPM3ForCausalLM": "minicpm3",
    "YoutuForCausalLM": "youtu",
}  # where there is no model_type
_OTHER_MODELS = {
    "kimi_linear": "most of its layers are linear attention; build an MLAConfig by hand for the "
    'others, with rope.layout "none"',
    "mistral4": "it scales queries by their positions",
    "mistral_large4": "its wavelengths are learned, and layers share keys and values",
    "axk2": "its attention has an output gate",
    "dots3_note": "its attention has an output gate, and a norm of the rotary key",
    "hy_v4": "its attention has an output gate, and learned sinks",
    "bailing_hybrid": "most of its layers are linear attention",
    "glm5_next": "it has layers of linear attention, and an indexer of its own",
}
_WRAPPED = ("text_config", "language_config")


def read_fields(config: Mapping[str, Any] | str | os.PathLike[str]) -> tuple[str, dict[str, Any]]:
    """Where the configuration stands, and the arguments of `MLAConfig`; see its `from_hf`."""
    hf = unwrap(_load(config))
    model_type = _model_type(hf)
    if model_type not in LAYOUTS:
        reason = _OTHER_MODELS.get(model_type)
        raise NotImplementedError(
            f"{hf.where}: {hf.path}model_type must be one of {MODEL_TYPES}, got "
            f"{describe(model_type)}" + (f": {reason}" if reason else "")
        )
    refuse_other_attention(hf, model_type)

    hidden_size, num_heads = hf.integer("hidden_size"), hf.integer("num_attention_heads")
    nope, rope = hf.integer("qk_nope_head_dim"), hf.integer("qk_rope_head_dim")
    q_lora_rank, kv_lora_rank = _q_lora_rank(hf, model_type), hf.integer("kv_lora_rank")
    if model_type == "minicpm3":
        v_head_dim = hf.integer("v_head_dim", None) or hidden_size // num_heads
    else:
        v_head_dim = hf.integer("v_head_dim")
    _check_implied(hf, "qk_head_dim", nope + rope, "qk_nope_head_dim + qk_rope_head_dim")
    if model_type in ("glm4_moe_lite", "longcat_flash"):  # the others do not read it
        _check_implied(hf, "head_dim", rope, "qk_rope_head_dim")

    q_scale = kv_scale = 1.0
    if model_type == "longcat_flash":
        # The published config has these two as flags; transformers takes them as set.
        if hf.boolean("mla_scale_q_lora", True):
            q_scale = math.sqrt(hidden_size / q_lora_rank)
        if hf.boolean("mla_scale_kv_lora", True):
            kv_scale = math.sqrt(hidden_size / kv_lora_rank)
    # The latent norms' epsilon is 1e-6 in every model, whatever rms_norm_eps says.
    return hf.where, {
        "hidden_size": hidden_size,
        "num_heads": num_heads,
        "q_lora_rank": q_lora_rank,
        "kv_lora_rank": kv_lora_rank,
        "qk_nope_head_dim": nope,
        "qk_rope_head_dim": rope,
        "v_head_dim": v_head_dim,
        "rope": read_rope(hf, model_type),
        "q_scale": q_scale,
        "kv_scale": kv_scale,
        "indexer": read_indexer(hf, model_type),
    }


def unwrap(hf: JsonObject) -> JsonObject:
    """The language model's part of a configuration that wraps one, as of images and text."""
    if hf.get("model_type") in MODEL_TYPES:
        return hf
    wrapped = [key for key in _WRAPPED if hf.get(key) is not None]
    if len(wrapped) > 1:
        raise ValueError(f"{hf.where}: only one of {wrapped} must be there, got both")
    return hf.object(wrapped[0]) if wrapped else hf


def _load(config: Mapping[str, Any] | str | os.PathLike[str]) -> JsonObject:
    if isinstance(config, Mapping):
        return JsonObject(config, "config")
    if not isinstance(config, str | os.PathLike):
        way = ": pass its to_dict()" if hasattr(config, "to_dict") else ""
        raise TypeError(
            f"config must be a dict, a config.json or its folder, got {type(config).__name__}{way}"
        )
    path = pathlib.Path(config)
    if path.is_dir():
        path /= "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"config must be a dict, a config.json or its folder, got {str(config)!r}, where "
            f"there is no file {path.name}{download_first(config)}"
        )
    return read_json(path)


def download_first(name: str | os.PathLike[str]) -> str:
    """What to do about a name that is not on this machine, if it can be one of the hub's."""
    parts = str(name).split("/")
    if len(parts) != 2 or not all(parts) or str(name).startswith((".", "~")):
        return ""
    return (
        ". If it is a model of the Hugging Face hub, download it first: "
        f"huggingface_hub.snapshot_download({str(name)!r}) returns its folder"
    )


def _model_type(hf: JsonObject) -> str:
    model_type = hf.string("model_type", None)
    if model_type is not None:
        return model_type
    architectures = hf.strings("architectures")
    known = {_ARCHITECTURES[name] for name in architectures if name in _ARCHITECTURES}
    if len(known) == 1:
        return known.pop()
    raise ValueError(
        f"{hf.where}: {hf.path}model_type must be one of {MODEL_TYPES}, or architectures one of "
        f"{sorted(_ARCHITECTURES)}, got no model_type and architectures = {describe(architectures)}"
    )


def _q_lora_rank(hf: JsonObject, model_type: str) -> int | None:
    """The rank; null, but not an absent key, says that queries are projected directly."""
    if model_type != "longcat_flash" and "q_lora_rank" in hf and hf.get("q_lora_rank") is None:
        return None
    return hf.integer("q_lora_rank")


def _check_implied(hf: JsonObject, key: str, expected: int, formula: str) -> None:
    """That a key which may be there says what others do."""
    got = hf.integer(key, None)
    if got is not None and got != expected:
        raise hf.error(key, f"must be {formula} = {expected}", got)
