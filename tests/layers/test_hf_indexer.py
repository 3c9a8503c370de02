"""The indexer of a config.json: its numbers, and which layers share a selection."""

from __future__ import annotations

import pytest

from hf_configs import GLM5, V3, V32
from jax_flashmla.layers import MLAConfig


@pytest.mark.parametrize(
    ("keys", "shared"),
    [
        ({}, ()),
        ({"indexer_types": ["full", "shared", "full", "shared"]}, (False, True, False, True)),
        ({"index_topk_pattern": "FSSF", "index_topk_freq": 2}, (False, True, True, False)),
        ({"index_topk_pattern": ["full"] * 4}, ()),
        ({"index_topk_pattern": "FSSFS"}, (False, True, True, False)),  # one more predicts ahead
        ({"index_topk_freq": 2, "index_skip_topk_offset": 1}, (False, True, False, True)),
        ({"index_topk_freq": 3}, (False, False, True, True)),
    ],
)
def test_layers_that_share_selections(keys, shared):
    glm = {
        key: x
        for key, x in GLM5.items()
        if key not in ("index_topk_freq", "index_skip_topk_offset")
    }
    indexer = MLAConfig.from_hf({**glm, "num_hidden_layers": 4, **keys}).indexer
    assert indexer.shared == shared
    assert (indexer.num_heads, indexer.topk, indexer.rope_layout) == (32, 2048, "interleaved")


def test_indexers_are_read_or_refused():
    indexer = MLAConfig.from_hf(V32).indexer
    assert (indexer.num_heads, indexer.head_dim, indexer.rope_layout) == (64, 128, "half")
    turned = MLAConfig.from_hf({**V32, "indexer_rope_interleave": True}).indexer
    assert turned.rope_layout == "interleaved"
    assert MLAConfig.from_hf(V3).indexer is None
    for keys, error, message in (
        ({"index_heads": 3}, NotImplementedError, "index_heads must be absent: an indexer is"),
        ({"index_n_heads": 65}, ValueError, "config: indexer.num_heads must be"),
        ({"index_topk": "many"}, ValueError, "config: index_topk must be an integer"),
        ({"indexer_types": ["full", "half"]}, ValueError, "indexer_types must be 'full' or 'shar"),
        ({"index_topk_pattern": "SF"}, ValueError, "index_topk_pattern must begin with 'full'"),
        ({"index_topk_pattern": "FSF"}, ValueError, "must be of all num_hidden_layers = 61"),
    ):
        with pytest.raises(error, match=message):
            MLAConfig.from_hf(
                {**V32, "num_hidden_layers": 61 if "FSF" in keys.values() else 2} | keys
            )


@pytest.mark.parametrize("hf", [V32, GLM5], ids=["deepseek_v32", "glm_moe_dsa"])
def test_sparse_attention_under_other_names(hf):
    """As earlier releases of transformers wrote it, and as other models say it."""
    expected = MLAConfig.from_hf(hf)
    for keys in (
        {"layer_types": ["deepseek_sparse_attention"] * 2},
        {"layer_types": ["indexed_attention", "deepseek_sparse_attention"]},
        {"use_dsa": True},
        {"use_dsa": None, "use_nsa": False},
    ):
        assert MLAConfig.from_hf({**hf, **keys}) == expected
    for key, value in (
        ("layer_types", ["full_attention", "indexed_attention"]),
        ("layer_types", ["attention"]),
        ("layer_types", ["qwen_sparse_attention"]),
        ("use_dsa", False),
        ("use_dsa", 1),
        ("dsa_topk", 512),
        ("sparse_attention_config", {"sparse_topk_blocks": 16}),
    ):
        with pytest.raises(NotImplementedError, match=f"^config: {key} must be .*, got"):
            MLAConfig.from_hf({**hf, key: value})
    with pytest.raises(NotImplementedError, match=r"^config: use_dsa must be false"):
        MLAConfig.from_hf({**V3, "use_dsa": True})
