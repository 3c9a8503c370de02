"""Layers with MaxText's and jax-llm-examples' weights, against attention in those layouts."""

from __future__ import annotations

import dataclasses
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import layer_cases
import other_projects
import sparse_layers
import tolerances
from jax_flashmla.layers import (
    IndexerConfig,
    MLAConfig,
    MLAParams,
    RopeConfig,
    YarnConfig,
    decode,
    prefill,
)

pytestmark = pytest.mark.usefixtures("on_cpu")

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "integrations.md"
V3 = layer_cases.V3
INDEXED = dataclasses.replace(
    V3, indexer=IndexerConfig(num_heads=8, topk=5, rope_layout="half", head_dim=16)
)


def sections() -> dict[str, str]:
    parts = re.split(r"^## (.*)\n", PAGE.read_text(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.fixture(scope="module")
def guide() -> dict:
    """What the page's code defines, run as printed."""
    names: dict = {}
    for title in ("MaxText", "jax-llm-examples"):
        for code in re.findall(r"```python\n(.*?)```", sections()[title], re.DOTALL):
            assert "assert " in code
            exec(compile(code, str(PAGE), "exec"), names)
    return names


def attend(config: MLAConfig, params: MLAParams, x: np.ndarray, lengths: list[int], cache=None):
    """A prefill of all but 2 tokens of each sequence, then two steps: y [b, tokens, hidden]."""
    y = np.full(x.shape, np.nan)
    cache = layer_cases.make_cache(config, lengths) if cache is None else cache
    for function, counts in (
        (prefill, np.array(lengths) - 2),
        (decode, np.ones(len(lengths))),
        (decode, np.ones(len(lengths))),
    ):
        at = np.asarray(cache.table.cache_seqlens)
        counts = counts.astype(np.int32)
        chunk = np.zeros((len(x), counts.max(), x.shape[2]), np.float32)
        for i, n in enumerate(counts):
            chunk[i, :n] = x[i, at[i] : at[i] + n]
        cache, slots = cache.advance(int(counts.max()), counts)
        run = layer_cases.COMPILED[function]
        cache, out = run(config, params, jnp.asarray(chunk), cache, slots=slots)
        for i, n in enumerate(counts):
            y[i, at[i] : at[i] + n] = out[i, :n]
    return y


@pytest.mark.parametrize(
    "changes", [{}, {"q_lora_rank": 0, "rope_interleave": False}], ids=["low rank", "direct"]
)
def test_maxtext_weights_compute_what_maxtext_does(guide, changes):
    model = other_projects.MAXTEXT | changes
    config, weights = guide["config_of"](model), other_projects.maxtext_weights(model)
    params = MLAParams.from_maxtext(config, weights, dtype=jnp.float32)
    lengths = [9, 6]
    x = layer_cases.make_x(config, 2, 9)
    y = attend(config, params, x, lengths)
    for i, length in enumerate(lengths):
        expected = other_projects.maxtext_attention(
            model, weights, x[i, :length].astype(np.float64)
        )
        tolerances.assert_close("y", y[i, :length], expected, tolerances.F32_LAYER)


def test_maxtext_indexer_selects_what_maxtext_does(guide):
    indexer = IndexerConfig(num_heads=4, topk=5, rope_layout="half", head_dim=16)
    config = dataclasses.replace(guide["config_of"](other_projects.MAXTEXT), indexer=indexer)
    index = other_projects.random_tree(
        {
            "wq_b": {"kernel": (10, 4, 16)},
            "wk": {"kernel": (24, 16)},
            "k_norm": {"scale": (16,), "bias": (16,)},
            "weights_proj": {"kernel": (24, 4)},
        }
    )
    weights = other_projects.maxtext_weights(other_projects.MAXTEXT) | {"indexer": index}
    params = MLAParams.from_maxtext(config, weights, dtype=jnp.float32)
    x = layer_cases.make_x(config, 1, 12)
    y = attend(config, params, x, [12], sparse_layers.make_cache(config, [12]))
    expected = other_projects.maxtext_attention(
        other_projects.MAXTEXT, weights, x[0].astype(np.float64), topk=5
    )
    dense = other_projects.maxtext_attention(
        other_projects.MAXTEXT, weights, x[0].astype(np.float64)
    )
    assert abs(expected - dense).max() > 0.01  # the selection matters
    tolerances.assert_close("y", y[0], expected, tolerances.F32_LAYER)


LLM_CONFIG = MLAConfig(
    hidden_size=24,
    num_heads=4,
    q_lora_rank=10,
    kv_lora_rank=16,
    qk_nope_head_dim=6,
    qk_rope_head_dim=8,
    v_head_dim=5,
    rope=RopeConfig(
        layout="deinterleaved",
        yarn=YarnConfig(factor=40.0, original_max_positions=16, mscale=1.0, mscale_all_dim=1.0),
    ),
)


@pytest.mark.parametrize("quantised", [False, True], ids=["floats", "int8"])
def test_jax_llm_examples_weights_compute_what_it_does(quantised):
    layer = other_projects.llm_layer(quantised=quantised)
    params = MLAParams.from_jax_llm_examples(LLM_CONFIG, layer, dtype=jnp.float32)
    padding = np.array([0, 3])
    left = layer_cases.make_x(LLM_CONFIG, 2, 9)
    right = np.stack([np.roll(x, -n, axis=0) for x, n in zip(left, padding, strict=True)])
    y = attend(LLM_CONFIG, params, right, [9, 6])
    expected = other_projects.llm_attention(layer, left.astype(np.float64), padding)
    for i, n in enumerate(padding):
        tolerances.assert_close("y", y[i, : 9 - n], expected[i, n:], tolerances.F32_LAYER)


@pytest.mark.parametrize("config", [V3, layer_cases.LITE, INDEXED], ids=["v3", "lite", "indexer"])
def test_maxtext_and_back(config):
    params = layer_cases.make_params(config, "bfloat16")
    again = MLAParams.from_maxtext(config, params.to_maxtext())
    jax.tree.map(np.testing.assert_array_equal, again, params)
    expected = MLAParams.shapes(config, jnp.bfloat16)
    assert jax.tree.map(lambda a: a.dtype, again) == jax.tree.map(lambda a: a.dtype, expected)
    if config.indexer is not None:  # passed over where the config has none
        plain = MLAParams.from_maxtext(V3, params.to_maxtext())
        assert plain.index_w_k is None


def test_jax_llm_examples_and_back():
    params = layer_cases.make_params(V3, "bfloat16")
    again = MLAParams.from_jax_llm_examples(V3, params.to_jax_llm_examples())
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_every_wrong_array_is_named():
    tree = layer_cases.make_params(V3).to_maxtext()
    del tree["wkv_a"]
    tree["g_proj"] = {"kernel": jnp.ones((24, 8))}
    tree["out"]["kernel"] = jnp.ones((8, 24, 5))
    message = (
        "weights: wkv_a.kernel is missing; g_proj.kernel is not one of this layer's; out.kernel "
        "must be (8, 5, 24), got (8, 24, 5)"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        MLAParams.from_maxtext(V3, tree)
    layer = other_projects.llm_layer(quantised=True)
    layer.o.scale = layer.o.scale[:3]
    with pytest.raises(ValueError, match=r"layer.o.scale .* axis -1 .*\(4, 5, 24\), got .*\(3,\)"):
        MLAParams.from_jax_llm_examples(LLM_CONFIG, layer)
    del layer.o
    with pytest.raises(ValueError, match="layer: o is missing"):
        MLAParams.from_jax_llm_examples(LLM_CONFIG, layer)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ("from_maxtext(V3, [1])", TypeError, "weights must be the dict .* got list"),
        ("from_maxtext(V3, {'query': 3})", ValueError, "query is not one of"),
        ("from_maxtext(V3, {'wq_a': {'kernel': [[1.0]]}})", TypeError, r"wq_a.kernel .*\[24, 10\]"),
        ("from_maxtext({}, {})", TypeError, "config must be an MLAConfig, got dict"),
        ("from_maxtext(V3, {}, dtype=int)", TypeError, "dtype must be floating"),
        ("init({}, jax.random.key(0))", TypeError, "config must be an MLAConfig, got dict"),
        ("init(V3, jax.random.key(0), int)", TypeError, "dtype must be floating"),
        ("from_jax_llm_examples(V3, 7)", TypeError, "AttentionLayer .* got int"),
        ("from_jax_llm_examples(INDEXED, {})", ValueError, "no indexer"),
        ("from_jax_llm_examples(LITE, {})", ValueError, "q_lora_rank"),
    ],
)
def test_wrong_calls_are_named(call, error, message):
    with pytest.raises(error, match=message):
        eval(f"MLAParams.{call}", {**globals(), "LITE": layer_cases.LITE})


@pytest.mark.parametrize(
    ("config", "message"), [(layer_cases.LITE, "have w_dq"), (INDEXED, "no indexer")]
)
def test_layers_that_jax_llm_examples_has_not(config, message):
    with pytest.raises(ValueError, match=message):
        layer_cases.make_params(config).to_jax_llm_examples()
