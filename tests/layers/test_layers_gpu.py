"""Layers of published models' dimensions, on every device that has kernels."""

from __future__ import annotations

import dataclasses

import tolerances
from jax_flashmla.layers import decode, prefill
from layer_cases import V3, Run


def test_dimensions_of_published_models(kernel: str) -> None:
    """What the Hopper kernels and cuDNN take, on a GPU; heads of 192 columns, rows of 576."""
    config = dataclasses.replace(
        V3,
        hidden_size=256,
        q_lora_rank=96,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
    )
    run = Run(
        config,
        [150, 70],
        dtype="bfloat16",
        tolerance=tolerances.BF16_LAYER,
        block_size=64,
        implementation=kernel,
    )
    run.step(prefill, [100, 64], prefix=False)
    run.step(prefill, [45, 1], 48)
    run.step(decode, [1, 1])
    run.step(decode, [4, 4])
    run.check()
