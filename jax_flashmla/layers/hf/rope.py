"""The rotary embedding of a config.json, by the rules of transformers' own models, release 5.

Where a key's name has changed over the releases (rope_scaling became rope_parameters, which took
rope_theta in; type became rope_type), both are read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from jax_flashmla.layers.hf.json_object import REQUIRED, JsonObject, describe
from jax_flashmla.layers.hf.refused_keys import refuse_scaled_queries
from jax_flashmla.layers.rope_config import (
    LongRopeConfig,
    RopeConfig,
    YarnConfig,
    longer_context_scale,
)

# How each model rotates; None where the key rope_interleave decides.
LAYOUTS = {
    "deepseek_v2": "interleaved",
    "deepseek_v3": None,
    "deepseek_v32": "deinterleaved",
    "kimi_k2": None,
    "glm_moe_dsa": "deinterleaved",
    "glm4_moe_lite": None,
    "longcat_flash": "deinterleaved",
    "minicpm3": "half",
    "youtu": None,
    "axk1": None,
    "sarvam_mla": None,
}
_DEFAULT_THETA = {"longcat_flash": 1e7}


def read_rope(hf: JsonObject, model_type: str) -> RopeConfig:
    """The rotary embedding; see `MLAConfig.from_hf` for what is raised."""
    scaling, parameters = hf.object("rope_scaling"), hf.object("rope_parameters")
    rope = scaling if scaling.values else parameters
    by_layer = [key for key in rope if isinstance(rope.get(key), Mapping)]
    if by_layer:
        raise NotImplementedError(
            f"{hf.where}: {rope.path.rstrip('.')} must be the same for all layers, got them by "
            f"layer type: {describe(by_layer)}"
        )
    refuse_scaled_queries(rope)
    for source in (rope, hf):
        partial = source.number("partial_rotary_factor", 1.0, zero=True)
        if partial != 1:
            raise NotImplementedError(
                f"{hf.where}: {source.path}partial_rotary_factor must be 1, as qk_rope_head_dim "
                f"says what rotates, got {partial}"
            )
    layout = LAYOUTS[model_type]
    if layout is None:
        if "rope_interleave" in hf and hf.get("rope_interleave") is None:
            raise hf.error("rope_interleave", "must be true or false, or absent for true", None)
        layout = "deinterleaved" if hf.boolean("rope_interleave", True) else "half"
    theta = hf.number("rope_theta", _DEFAULT_THETA.get(model_type, 10000.0))
    theta = rope.number("rope_theta", theta)

    kind = rope.string("rope_type", rope.string("type", "default"))
    if kind == "deepseek_yarn" and model_type == "sarvam_mla":  # before transformers had the model
        kind = "yarn"
    if kind not in ("default", "yarn", "longrope"):
        raise NotImplementedError(
            f"{hf.where}: {rope.path}rope_type must be default, yarn or longrope, got "
            f"{describe(kind)}: no published model with latent attention has another"
        )
    yarn = _read_yarn(hf, rope) if kind == "yarn" else None
    longrope = _read_longrope(hf, rope) if kind == "longrope" else None
    try:
        return RopeConfig(layout=layout, theta=theta, yarn=yarn, longrope=longrope)
    except ValueError as error:
        raise ValueError(f"{hf.where}: {error}") from None


def _read_yarn(hf: JsonObject, rope: JsonObject) -> YarnConfig:
    original = _original_positions(hf, rope)
    factor = rope.number("factor", None)
    fast, slow = rope.number("beta_fast", 32.0), rope.number("beta_slow", 1.0)
    if fast < slow:
        raise rope.error("beta_fast", f"must be at least beta_slow = {slow}", fast)
    return YarnConfig(
        factor=hf.integer("max_position_embeddings") / original if factor is None else factor,
        original_max_positions=original,
        beta_fast=fast,
        beta_slow=slow,
        mscale=rope.number("mscale", 0.0, zero=True),
        mscale_all_dim=rope.number("mscale_all_dim", 0.0, zero=True),
        attention_factor=rope.number("attention_factor", None),
        truncate=rope.boolean("truncate", True),
    )


def _read_longrope(hf: JsonObject, rope: JsonObject) -> LongRopeConfig:
    original = _original_positions(hf, rope)
    longest = hf.integer("max_position_embeddings")
    short, long = rope.numbers("short_factor"), rope.numbers("long_factor")
    if longest > original and short != long:
        raise NotImplementedError(
            f"{hf.where}: {rope.path}long_factor must be short_factor where "
            f"max_position_embeddings = {longest} is more than original_max_position_embeddings = "
            f"{original}: other factors past {original} tokens would ask for other keys than the "
            f"cache holds. Set max_position_embeddings to {original}, or build a LongRopeConfig "
            "with the factors to use throughout"
        )
    # A softmax scale asks for the factor itself: transformers does not compute it then.
    mscale = rope.number("mscale_all_dim", 0.0, zero=True)
    factor = rope.number("factor", REQUIRED if mscale else longest / original)
    attention_factor = rope.number("attention_factor", None)
    if attention_factor is None:
        attention_factor = 1.0
        if factor > 1:
            if original == 1:
                raise ValueError(
                    f"{hf.where}: original_max_position_embeddings must be more than 1, as "
                    "longrope's attention_factor divides by its log, got 1"
                )
            attention_factor = math.sqrt(1 + math.log(factor) / math.log(original))
    return LongRopeConfig(
        factors=short,
        attention_factor=attention_factor,
        softmax_scale=longer_context_scale(factor, mscale) ** 2 if mscale else 1.0,
    )


def _original_positions(hf: JsonObject, rope: JsonObject) -> int:
    for source in (hf, rope):
        original = source.integer("original_max_position_embeddings", None)
        if original is not None:
            return original
    return hf.integer("max_position_embeddings")
