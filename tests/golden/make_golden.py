"""Writes tiny random models with transformers, and what it computes with them.

    python tests/golden/make_golden.py

Each model is a folder as `save_pretrained` writes it, in bfloat16, and golden.safetensors, computed
in float32 with the same weights:

    x, y        input and output of the first layer's attention [TOKENS, hidden], float32
    tokens      what the whole model was given [TOKENS], int32
    logits      its logits at the last LOGITS of them [LOGITS, vocab], float32
    prompt.i    prompts for generation [any], int32
    greedy.i    the tokens that greedy generation adds, up to and with the end token [any], int32
    selected    with an indexer, the tokens that the first layer's selects for each [TOKENS, topk],
                int32; of tokens that see fewer, the last ones mean nothing

It needs torch and transformers; the tests that read the files need neither.
"""

from __future__ import annotations

import pathlib
import sys

TOKENS = 80  # 16 to prefill and 64 to decode; YaRN's original context below is 32
LOGITS = 16
MAX_NEW_TOKENS = 24
PROMPTS = ("Attention!", "A much longer prompt than the others of this batch.", "x", "JAX", "ends")

_SMALL = {
    "vocab_size": 256,  # bytes
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "max_position_embeddings": 128,
    # Far from transformers' 0.02, so that scores and routing differ from token to token.
    "initializer_range": 0.25,
    "bos_token_id": None,
    "eos_token_id": None,
}
_EXPERTS = {
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
}

# Heads enough that no two scores are 0, as where every head's relu is: equal ones may be ranked
# anyhow.
_INDEXER = {"index_n_heads": 8, "index_head_dim": 32, "index_topk": 24}


def _yarn(mscale: float) -> dict:
    return {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": mscale,
        "mscale_all_dim": mscale,
    }


MODELS = {
    "deepseek_v2": {
        **_SMALL,
        **_EXPERTS,
        "first_k_dense_replace": 1,
        "topk_method": "group_limited_greedy",
        "routed_scaling_factor": 1.5,
        "rope_parameters": _yarn(0.707),
    },
    "deepseek_v2_lite": {
        **_SMALL,
        **_EXPERTS,
        "model_type": "deepseek_v2",
        "q_lora_rank": None,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "topk_method": "greedy",
        "rope_parameters": {**_yarn(0.707), "mscale": 1.0},
    },
    "deepseek_v3": {
        **_SMALL,
        **_EXPERTS,
        "first_k_dense_replace": 1,
        "rope_parameters": _yarn(1.0),
    },
    "glm4_moe_lite": {
        **_SMALL,
        **_EXPERTS,
        "n_group": 1,
        "topk_group": 1,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    },
    # Cache rows as the Hopper kernels take them; without experts, whose choice rounding can turn.
    "deepseek_v3_wide": {
        **_SMALL,
        **_EXPERTS,
        "model_type": "deepseek_v3",
        "num_hidden_layers": 1,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "tie_word_embeddings": True,
        "rope_parameters": _yarn(1.0),
    },
    "deepseek_v32": {
        **_SMALL,
        **_EXPERTS,
        **_INDEXER,
        "first_k_dense_replace": 1,
        "rope_parameters": _yarn(1.0),
    },
    # Index keys of 128 columns, and rows that can be stored in fp8.
    "deepseek_v32_wide": {
        **_SMALL,
        **_EXPERTS,
        **_INDEXER,
        "model_type": "deepseek_v32",
        "num_hidden_layers": 1,
        "first_k_dense_replace": 1,
        "index_head_dim": 128,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "tie_word_embeddings": True,
        "rope_parameters": _yarn(1.0),
    },
    "glm_moe_dsa": {
        **_SMALL,
        **_EXPERTS,
        **_INDEXER,
        "num_hidden_layers": 3,
        "indexer_types": ["full", "shared", "full"],
        "first_k_dense_replace": 2,
        "n_group": 1,
        "topk_group": 1,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 8e6},
    },
    "axk1": {
        **_SMALL,
        "num_hidden_layers": 1,
        "first_k_dense_replace": 1,
        "vocab_size": 64,
        "tie_word_embeddings": True,
        "rope_parameters": _yarn(1.0),
    },
    "youtu": {**_SMALL, "num_hidden_layers": 1, "vocab_size": 64, "tie_word_embeddings": True},
    "sarvam_mla": {
        **_SMALL,
        "num_hidden_layers": 1,
        "first_k_dense_replace": 1,
        "vocab_size": 64,
        "q_lora_rank": None,
        "tie_word_embeddings": True,
        "rope_parameters": _yarn(1.0),
    },
    "minicpm3": {**_SMALL, "num_hidden_layers": 1, "vocab_size": 64, "tie_word_embeddings": True},
}


def write(name: str, directory: pathlib.Path, seed: int = 0) -> None:
    """One model and its golden.safetensors."""
    import torch
    import transformers
    from safetensors.torch import save_file

    torch.manual_seed(seed)
    options = dict(MODELS[name])
    config = transformers.AutoConfig.for_model(options.pop("model_type", name), **options)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for key, value in [*model.named_parameters(), *model.named_buffers()]:
            if key.endswith("norm.weight"):
                value.add_(0.3 * torch.randn(value.shape))  # by default ones
            elif key.endswith("k_norm.bias"):
                value.copy_(0.3 * torch.randn(value.shape))  # by default zeros
            elif key.endswith("kv_b_proj.weight"):
                value.mul_((16 / config.kv_lora_rank) ** 0.5)  # keys of one size, whatever the rank
            elif key.endswith("e_score_correction_bias"):
                value.copy_(0.2 * torch.randn(value.shape))  # by default zeros
    model.to(torch.bfloat16).save_pretrained(directory)
    # Read anew: the conversion to bfloat16 has rounded the rotary frequencies too.
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()

    golden = {}

    def keep(module, args, kwargs, result):
        golden["x"] = (args or (kwargs["hidden_states"],))[0][0].clone()
        golden["y"] = result[0][0].clone()

    def keep_selected(module, args, result):
        golden["selected"] = result[0].int().clone()

    tokens = torch.randint(config.vocab_size, (TOKENS,))
    with torch.no_grad():
        hook = model.model.layers[0].self_attn.register_forward_hook(keep, with_kwargs=True)
        hooks = [hook]
        if hasattr(config, "index_topk"):
            indexer = model.model.layers[0].self_attn.indexer
            hooks.append(indexer.register_forward_hook(keep_selected))
        logits = model(tokens[None]).logits[0, -LOGITS:]
        for hook in hooks:
            hook.remove()
    golden |= {"tokens": tokens.int(), "logits": logits.clone()}
    if name not in ("minicpm3", "youtu", "axk1", "sarvam_mla"):  # the example has no such models
        _generate(model, golden)
        model.generation_config.eos_token_id = golden.pop("end").tolist()
        model.generation_config.save_pretrained(directory)
    save_file(golden, directory / "golden.safetensors")


def _generate(model, golden: dict) -> None:
    """Greedy tokens of all prompts, and an end token that stops the first one early."""
    import torch

    def generate(prompt: list[int], end: int | None) -> torch.Tensor:
        given = torch.tensor([prompt])
        result = model.generate(
            given,
            attention_mask=torch.ones_like(given),
            do_sample=False,
            max_new_tokens=MAX_NEW_TOKENS,
            eos_token_id=end,
            pad_token_id=0,
        )
        return result[0, len(prompt) :].int()

    prompts = [list(prompt.encode()) for prompt in PROMPTS]
    first = generate(prompts[0], None).tolist()
    late = [token for i, token in enumerate(first) if i > 3 and token not in first[:i]]
    golden["end"] = torch.tensor(late[0] if late else first[-1])
    for i, prompt in enumerate(prompts):
        golden[f"prompt.{i}"] = torch.tensor(prompt).int()
        golden[f"greedy.{i}"] = generate(prompt, int(golden["end"])).clone()


def main() -> int:
    folder = pathlib.Path(__file__).parent
    for name in MODELS:
        write(name, folder / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
