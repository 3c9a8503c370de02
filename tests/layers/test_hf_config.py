"""What of a config.json is read, what is refused, and how: by file and key."""

from __future__ import annotations

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from hf_configs import (
    DEEPSEEK_YARN,
    GLM,
    KIMI_K2,
    LONGCAT,
    MINICPM3,
    PUBLISHED,
    V2_LITE,
    V3,
    without,
)
from jax_flashmla.layers import MLAConfig


def test_files_and_folders(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(V3))
    assert MLAConfig.from_hf(tmp_path) == MLAConfig.from_hf(V3)
    assert MLAConfig.from_hf(str(file)) == MLAConfig.from_hf(V3)
    with pytest.raises(FileNotFoundError, match=r"no file nowhere\.json"):
        MLAConfig.from_hf(tmp_path / "nowhere.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "must be JSON"),
        ("", "must be JSON"),
        ("[" * 100_000, "must be JSON"),
        ("9" * 5000, "must be JSON"),
        ("\ufeff{}", "must be JSON"),
        ("[]", r"must be a JSON object, got \[\]"),
        ("null", "must be a JSON object, got null"),
        (json.dumps([V3]), "must be a JSON object, got "),
        ("{}", r"model_type must be one of"),
        (json.dumps({**V3, "kv_lora_rank": "512"}), "kv_lora_rank must be an integer"),
        (json.dumps({**V3, "qk_rope_head_dim": 63}), "qk_rope_head_dim must be even"),
    ],
    ids=lambda text: text[:20],
)
def test_the_file_is_named(tmp_path, text, message):
    file = tmp_path / "config.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=f"^{file}:? .*{message}"):
        MLAConfig.from_hf(tmp_path)


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "config.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(ValueError, match="must be JSON"):
        MLAConfig.from_hf(tmp_path)


@pytest.mark.parametrize("name", ["deepseek-ai/DeepSeek-V3", "org/name"])
def test_a_name_of_the_hub_says_to_download(name):
    with pytest.raises(FileNotFoundError, match=rf"snapshot_download\('{name}'\) returns its fol"):
        MLAConfig.from_hf(name)


@pytest.mark.parametrize("name", ["/nowhere/config.json", "./config.json", "nowhere", "a/b/c"])
def test_other_names_do_not(name):
    with pytest.raises(FileNotFoundError) as error:
        MLAConfig.from_hf(name)
    assert "hub" not in str(error.value)


def test_an_object_of_transformers_says_how():
    class Config:
        def to_dict(self):
            return V3

    with pytest.raises(TypeError, match=r"got Config: pass its to_dict\(\)"):
        MLAConfig.from_hf(Config())
    with pytest.raises(TypeError, match=r"got int$"):
        MLAConfig.from_hf(3)


INTEGERS = (
    "hidden_size",
    "num_attention_heads",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
)


@pytest.mark.parametrize("key", [*INTEGERS, "q_lora_rank"])
def test_integers_are_checked(key):
    wrong = ["512", [512], {}, True, 0, -1, 512.5, math.nan, math.inf, 2**31, 10**400]
    for value in wrong:
        with pytest.raises(ValueError, match=f"^config: {key} must be an integer between 1 and"):
            MLAConfig.from_hf({**V3, key: value})
    with pytest.raises(ValueError, match=rf"^config: {key} must be there, got the keys \["):
        MLAConfig.from_hf(without(V3, key))
    assert MLAConfig.from_hf({**V3, key: float(V3[key])}) == MLAConfig.from_hf(V3)
    assert MLAConfig.from_hf({**V3, key: np.int32(V3[key])}) == MLAConfig.from_hf(V3)
    if key != "q_lora_rank":
        with pytest.raises(ValueError, match=f"^config: {key} must not be null$"):
            MLAConfig.from_hf({**V3, key: None})


def test_longcat_has_a_query_rank():
    with pytest.raises(ValueError, match="q_lora_rank must not be null"):
        MLAConfig.from_hf({**LONGCAT, "q_lora_rank": None})


CHANGES_THE_MATHEMATICS = [
    ("use_mla", False),
    ("use_mla", 0),
    ("use_mla", "true"),
    ("attention_method", "MHA"),
    ("qk_latent_layernorm", False),
    ("llama_4_scaling", {"beta": 0.1, "original_max_position_embeddings": 8192}),
    ("llama_4_scaling_beta", 0.1),
    ("attention_bias", True),
    ("attention_bias", "false"),
    ("qkv_bias", True),
    ("q_bias", True),
    ("sliding_window", 4096),
    ("use_sliding_window", True),
    ("attention_chunk_size", 8192),
    ("use_qk_norm", True),
    ("qk_layernorm", True),
    ("attn_output_gate", True),
    ("use_output_gate", True),
    ("attention_sink", True),
    ("attn_logit_softcapping", 50.0),
    ("query_pre_attn_scalar", 256),
    ("mla_use_nope", True),
    ("linear_attn_config", {"kda_layers": [1, 2, 3]}),
    ("layer_types", ["full_attention", "sliding_attention"]),
    ("layer_types", ["indexed_attention"]),
    ("layer_types", ["deepseek_sparse_attention"]),
    ("dsa_topk", 2048),
    ("sparse_attention_config", {"sparse_topk_blocks": 16}),
    ("use_nsa", True),
    ("mla_scale_q_lora", True),
]


@pytest.mark.parametrize(("key", "value"), CHANGES_THE_MATHEMATICS, ids=str)
def test_keys_that_change_the_mathematics_are_refused(key, value):
    with pytest.raises(NotImplementedError, match=f"^config: {key} must be .*, got"):
        MLAConfig.from_hf({**V3, key: value})


def test_scaled_queries_among_the_rotary_parameters_are_refused():
    for beta in (0.1, "0.1"):
        scaling = {**DEEPSEEK_YARN, "llama_4_scaling_beta": beta}
        with pytest.raises(NotImplementedError, match=r"rope_scaling\.llama_4_scaling_beta must"):
            MLAConfig.from_hf({**V3, "rope_scaling": scaling})
    none = {**DEEPSEEK_YARN, "llama_4_scaling_beta": None}
    assert MLAConfig.from_hf({**V3, "rope_scaling": none}) == MLAConfig.from_hf(V3)


@pytest.mark.parametrize("model_type", PUBLISHED)
def test_harmless_values_are_not_refused(model_type):
    hf = PUBLISHED[model_type]
    expected = MLAConfig.from_hf(hf)
    for key, value in CHANGES_THE_MATHEMATICS:
        if key in hf:
            continue
        for harmless in (None, type(value)() if type(value) in (float, bool, int) else None):
            if key not in ("use_mla", "qk_latent_layernorm", "mla_scale_q_lora"):
                assert MLAConfig.from_hf({**hf, key: harmless}) == expected
    harmless = {
        "use_mla": True,
        "attention_method": "MLA",
        "qk_latent_layernorm": True,
        "sliding_window": 4096,
        "use_sliding_window": False,
        "layer_types": ["full_attention" if expected.indexer is None else "indexed_attention"] * 3,
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "decoder_sparse_step": 1,
        "rope_parameters": None,
        "num_key_value_heads": hf["num_attention_heads"],
        "qk_head_dim": float(hf["qk_nope_head_dim"] + hf["qk_rope_head_dim"]),
        "head_dim": hf["qk_rope_head_dim"],
    }
    assert MLAConfig.from_hf({**harmless, **hf}) == expected


def test_dimensions_that_disagree_are_refused():
    with pytest.raises(ValueError, match=r"qk_head_dim must be qk_nope_head_dim \+ qk_rope_head_"):
        MLAConfig.from_hf({**V3, "qk_head_dim": 128})
    with pytest.raises(ValueError, match=r"head_dim must be qk_rope_head_dim = 64, got 128"):
        MLAConfig.from_hf({**LONGCAT, "head_dim": 128})
    assert MLAConfig.from_hf({**V3, "head_dim": 56}) == MLAConfig.from_hf(V3)  # which V3 ignores


@pytest.mark.parametrize("key", ["rope_interleave", "truncate"])
@pytest.mark.parametrize("value", [1, "true", [], 0.0], ids=str)
def test_flags_are_booleans(key, value):
    scaling = {**DEEPSEEK_YARN, "truncate": value} if key == "truncate" else DEEPSEEK_YARN
    hf = {**V3, "rope_scaling": scaling} | ({key: value} if key != "truncate" else {})
    with pytest.raises(ValueError, match=f"{key} must be true or false, got"):
        MLAConfig.from_hf(hf)
    with pytest.raises(ValueError, match="mla_scale_kv_lora must be true or false"):
        MLAConfig.from_hf({**LONGCAT, "mla_scale_kv_lora": value})


def test_a_null_that_transformers_takes_for_false_is_refused():
    with pytest.raises(ValueError, match="rope_interleave must be true or false, or absent"):
        MLAConfig.from_hf({**V3, "rope_interleave": None})


@pytest.mark.parametrize("key", ["text_config", "language_config"])
def test_wrapped_models_are_read(key):
    expected = MLAConfig.from_hf(KIMI_K2)
    assert MLAConfig.from_hf({"model_type": "kimi_k25", key: KIMI_K2}) == expected
    assert MLAConfig.from_hf({key: KIMI_K2, "vision_config": {"hidden_size": 1}}) == expected
    # A model that is read is not looked into.
    assert MLAConfig.from_hf({**V2_LITE, key: KIMI_K2}) == MLAConfig.from_hf(V2_LITE)
    other = "text_config" if key == "language_config" else "language_config"
    assert MLAConfig.from_hf({key: KIMI_K2, other: None}) == expected
    with pytest.raises(ValueError, match="only one of"):
        MLAConfig.from_hf({key: KIMI_K2, other: V3})
    with pytest.raises(ValueError, match=f"config: {key} must be an object, got 3"):
        MLAConfig.from_hf({key: 3})
    with pytest.raises(ValueError, match=rf"config: {key}.kv_lora_rank must be an integer"):
        MLAConfig.from_hf({key: {**V3, "kv_lora_rank": "512"}})
    with pytest.raises(NotImplementedError, match=rf"config: {key}.use_mla must be true"):
        MLAConfig.from_hf({key: {**V2_LITE, "use_mla": False}})
    with pytest.raises(NotImplementedError, match=rf"config: {key}.model_type must be one of"):
        MLAConfig.from_hf({key: {"model_type": "x", key: V3}})


@pytest.mark.parametrize(
    ("model_type", "architecture"),
    [("longcat_flash", "LongcatFlashForCausalLM"), ("minicpm3", "MiniCPM3ForCausalLM")],
)
def test_models_without_a_type_are_known_by_their_architecture(model_type, architecture):
    hf = PUBLISHED[model_type]
    expected = MLAConfig.from_hf(hf)
    for other in (without(hf, "model_type"), {**hf, "model_type": None}):
        assert MLAConfig.from_hf({**other, "architectures": [architecture]}) == expected
        for value in (None, [], ["LlamaForCausalLM"]):
            with pytest.raises(ValueError, match="model_type must be one of"):
                MLAConfig.from_hf({**other, "architectures": value})
        for value in ("LongcatFlashForCausalLM", [3], {}):
            with pytest.raises(ValueError, match="architectures must be a list of strings"):
                MLAConfig.from_hf({**other, "architectures": value})


@pytest.mark.parametrize(
    ("hf", "error", "message"),
    [
        ({**V3, "model_type": "llama"}, NotImplementedError, r"must be one of .*got 'llama'$"),
        ({**V3, "model_type": ["x"]}, ValueError, "model_type must be a string"),
        ({**V3, "index_topk": 2048}, NotImplementedError, "index_topk must be absent, as deepseek"),
        ({**V3, "model_type": "kimi_linear"}, NotImplementedError, "linear attention"),
        ({**V3, "model_type": "mistral4"}, NotImplementedError, "scales queries by their pos"),
        ({**V3, "model_type": "axk2"}, NotImplementedError, "has an output gate"),
        ({**V3, "model_type": "hy_v4"}, NotImplementedError, "output gate, and learned sinks"),
        (
            {**V3, "rope_scaling": {**DEEPSEEK_YARN, "type": "deepseek_yarn"}},
            NotImplementedError,
            "must be default, yarn or longrope, got 'deepseek_yarn'",
        ),
        (
            {**V3, "rope_scaling": {"type": "linear", "factor": 2}},
            NotImplementedError,
            "rope_scaling.rope_type must be default, yarn or longrope, got 'linear'",
        ),
        ({**V3, "rope_scaling": {"type": 3}}, ValueError, "rope_scaling.type must be a string"),
        (
            {**GLM, "rope_parameters": {"full_attention": {}, "other": {}}},
            NotImplementedError,
            "rope_parameters must be the same for all layers, got them by layer type",
        ),
        (
            {**GLM, "partial_rotary_factor": 0.5, "rope_parameters": None},
            NotImplementedError,
            "partial_rotary_factor must be 1",
        ),
        ({**V3, "partial_rotary_factor": "1"}, ValueError, "partial_rotary_factor must be a num"),
        (
            {**V3, "rope_scaling": {**DEEPSEEK_YARN, "beta_slow": 64}},
            ValueError,
            "rope_scaling.beta_fast must be at least beta_slow = 64.0, got 32.0",
        ),
        ({**V3, "rope_theta": 1}, ValueError, "rope.theta must be more than 1"),
        (
            {
                **MINICPM3,
                "max_position_embeddings": 65536,
                "rope_scaling": {**MINICPM3["rope_scaling"], "long_factor": [2.0] * 16},
            },
            NotImplementedError,
            "long_factor must be short_factor where max_position_embeddings = 65536",
        ),
        (
            {
                **MINICPM3,
                "rope_scaling": {
                    **MINICPM3["rope_scaling"],
                    "original_max_position_embeddings": 1,
                    "factor": 2,
                },
            },
            ValueError,
            "original_max_position_embeddings must be more than 1",
        ),
        ({**V3, "qk_rope_head_dim": 63}, ValueError, "qk_rope_head_dim must be even"),
        ({**MINICPM3, "hidden_size": 39}, ValueError, "v_head_dim must be between 1"),
    ],
)
def test_what_is_not_supported_says_why(hf, error, message):
    with pytest.raises(error, match=message):
        MLAConfig.from_hf(hf)


def test_dtype_of_the_cache_is_not_the_configurations():
    """dtype and torch_dtype are of the weights."""
    config = MLAConfig.from_hf({**V3, "dtype": "float32", "torch_dtype": "float16"})
    assert config.cache_format().dtype == jnp.bfloat16
