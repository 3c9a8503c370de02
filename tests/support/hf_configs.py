"""What the published config.json files say of attention."""

DEEPSEEK_YARN = {
    "type": "yarn",
    "factor": 40,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
V3 = {
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "attention_bias": False,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 163840,
    "rope_theta": 10000,
    "rope_scaling": DEEPSEEK_YARN,
}
V2_LITE = {
    **V3,
    "model_type": "deepseek_v2",
    "hidden_size": 2048,
    "num_attention_heads": 16,
    "q_lora_rank": None,
    "rope_scaling": {**DEEPSEEK_YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
}
KIMI_K2 = {
    **V3,
    "model_type": "kimi_k2",
    "num_attention_heads": 64,
    "rope_theta": 50000.0,
    "rope_scaling": {**DEEPSEEK_YARN, "beta_fast": 1.0, "factor": 64.0},
}
GLM = {
    "model_type": "glm4_moe_lite",
    "hidden_size": 2048,
    "num_attention_heads": 20,
    "q_lora_rank": 768,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 192,
    "qk_rope_head_dim": 64,
    "v_head_dim": 256,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000, "partial_rotary_factor": 1},
}
V32 = {
    **V3,
    "model_type": "deepseek_v32",
    "index_head_dim": 128,
    "index_n_heads": 64,
    "index_topk": 2048,
}
GLM5 = {
    "model_type": "glm_moe_dsa",
    "hidden_size": 6144,
    "num_attention_heads": 64,
    "num_hidden_layers": 78,
    "q_lora_rank": 2048,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 192,
    "qk_rope_head_dim": 64,
    "v_head_dim": 256,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 8000000},
    "index_head_dim": 128,
    "index_n_heads": 32,
    "index_topk": 2048,
    "indexer_rope_interleave": True,
    "index_topk_freq": 4,
    "index_skip_topk_offset": 3,
}
YOUTU = {
    "model_type": "youtu",
    "hidden_size": 2048,
    "num_attention_heads": 16,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "rope_interleave": True,
    "rope_theta": 1600000,
}
SARVAM = {
    **V3,
    "model_type": "sarvam_mla",
    "hidden_size": 4096,
    "num_attention_heads": 64,
    "q_lora_rank": None,
    "head_dim": 576,
    "q_head_dim": 192,
    "rope_scaling": {**DEEPSEEK_YARN, "type": "deepseek_yarn"},
}
LONGCAT = {
    "model_type": "longcat_flash",
    "hidden_size": 6144,
    "num_attention_heads": 64,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "mla_scale_q_lora": True,
    "mla_scale_kv_lora": True,
    "rope_theta": 10000000.0,
}
LONGROPE = [1.0 + 0.25 * i for i in range(16)]
MINICPM3 = {
    "model_type": "minicpm3",
    "hidden_size": 2560,
    "num_attention_heads": 40,
    "q_lora_rank": 768,
    "kv_lora_rank": 256,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "max_position_embeddings": 32768,
    "rope_scaling": {
        "type": "longrope",
        "long_factor": LONGROPE,
        "short_factor": LONGROPE,
        "original_max_position_embeddings": 32768,
    },
}

PUBLISHED = {
    hf["model_type"]: hf
    for hf in (
        V3,
        V32,
        GLM5,
        YOUTU,
        SARVAM,
        {**V3, "model_type": "axk1"},
        V2_LITE,
        KIMI_K2,
        GLM,
        LONGCAT,
        MINICPM3,
    )
}


def without(hf: dict, key: str) -> dict:
    return {name: value for name, value in hf.items() if name != key}
