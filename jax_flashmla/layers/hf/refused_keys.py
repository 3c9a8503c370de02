"""Keys of a config.json that ask for another attention than `MLAConfig` describes.

Each is harmless where it says what holds anyway; else it is refused by name.
"""

from __future__ import annotations

import re
from typing import Any

from jax_flashmla.layers.hf.indexer import INDEXED
from jax_flashmla.layers.hf.json_object import JsonObject, describe

# Reason, then the keys that must be false, 0, empty or absent for it not to hold.
_MUST_BE_OFF = {
    "the projections have no biases": (
        "attention_bias",
        "attention_out_bias",
        "add_qkv_bias",
        "qkv_bias",
        "use_qkv_bias",
        "q_bias",
        "kv_bias",
        "o_bias",
        "use_bias",
    ),
    "heads are not normed: only the low-rank latents are": (
        "qk_norm",
        "use_qk_norm",
        "qk_layernorm",
        "use_qk_layernorm",
    ),
    "a token attends to all tokens up to itself": (
        "sliding_window_size",
        "use_sliding_window",
        "window_size",
        "attention_window_size",
        "attention_chunk_size",
        "linear_attn_config",
        "use_bidirectional_attention",
    ),
    "the output has no gate": (
        "attention_gate",
        "attention_output_gate",
        "attn_gate",
        "attn_output_gate",
        "elementwise_attn_output_gate",
        "gated_attention",
        "headwise_attn_output_gate",
        "output_gate",
        "use_attention_gate",
        "use_attn_gate",
        "use_gated_attention",
        "use_output_gate",
    ),
    "the softmax has no sink": (
        "add_full_attention_sink_bias",
        "add_swa_attention_sink_bias",
        "attention_sink",
        "attention_sinks",
        "use_attention_sink",
        "use_attention_sinks",
    ),
    "scores are not capped": (
        "attention_logit_cap",
        "attn_logit_cap",
        "attn_logit_softcapping",
        "logits_soft_cap",
    ),
    "sm_scale comes from the dimensions, YaRN and LongRoPE": (
        "attention_multiplier",
        "attn_scale",
        "query_pre_attn_scalar",
        "softmax_scale",
    ),
    "queries are scaled alike at all positions": ("llama_4_scaling", "llama_4_scaling_beta"),
    "all layers are rotated": ("alibi", "mla_use_nope", "no_rope_layer_interval", "no_rope_layers"),
}
# The only value that says what holds, and the reason.
_MUST_BE = {
    "use_mla": (True, "the attention is latent"),
    "attention_method": ("MLA", "the attention is latent"),
    "qk_latent_layernorm": (True, "the latents are normed"),
    "use_rope": (True, "all layers are rotated"),
    "position_embedding_type": ("rope", "positions are rotations"),
}
_LONGCAT = ("mla_scale_q_lora", "mla_scale_kv_lora")
# Of layers that all attend alike, in the names of now and of earlier releases of transformers.
_DENSE_LAYERS = ["attention", "full_attention"]
_INDEXED_LAYERS = ["indexed_attention", "deepseek_sparse_attention"]
# Sparse attention under other names than an indexer's (use_dsa, sparse_attention_config); experts
# are sparse too (decoder_sparse_step, mlp_layer_types).
_SPARSE = re.compile(r"(?:.*_)?(?:dsa|nsa|moba|sparse_(?:attention|attn|config))(?:_.*)?")


def refuse_other_attention(hf: JsonObject, model_type: str) -> None:
    """Raises NotImplementedError if a key asks for what `MLAConfig` cannot describe."""
    for reason, keys in _MUST_BE_OFF.items():
        for key in keys:
            _refuse_unless_off(hf, key, reason)
    # Where it is said that the window is not used, its size may stand there.
    if hf.get("use_sliding_window") is not False:
        _refuse_unless_off(hf, "sliding_window", "a token attends to all tokens up to itself")
    if model_type != "longcat_flash":
        for key in _LONGCAT:
            _refuse_unless_off(hf, key, "only longcat_flash scales its latents")
    for key, (expected, reason) in _MUST_BE.items():
        value = hf.get(key, expected)
        if type(value) is not type(expected) or value != expected:
            _refuse(hf, key, f"must be {describe(expected)}", reason)
    indexed = model_type in INDEXED
    for key in filter(_SPARSE.fullmatch, map(str, hf)):
        if not indexed or key != "use_dsa":
            _refuse_unless_off(hf, key, "only an indexer's keys (index_topk) make it sparse")
        elif hf.get(key, True) is not True:
            _refuse(hf, key, "must be true", "indexers select what is attended to")
    known = _INDEXED_LAYERS if indexed else _DENSE_LAYERS
    if set(hf.strings("layer_types")) - set(known):
        _refuse(hf, "layer_types", f"must be of {known}", "all layers attend alike")


def refuse_scaled_queries(rope: JsonObject) -> None:
    """The same for what stands among the rotary embedding's parameters."""
    _refuse_unless_off(rope, "llama_4_scaling_beta", "queries are scaled alike at all positions")


def _refuse_unless_off(hf: JsonObject, key: str, reason: str) -> None:
    if not _is_off(hf.get(key)):
        _refuse(hf, key, "must be false, null or absent", reason)


def _refuse(hf: JsonObject, key: str, rule: str, reason: str) -> None:
    raise NotImplementedError(
        f"{hf.where}: {hf.path}{key} {rule}, as {reason} in the attention that is supported, got "
        f"{describe(hf.get(key))}"
    )


def _is_off(value: Any) -> bool:
    return value is None or (
        isinstance(value, bool | int | float | str | list | dict) and not value
    )
