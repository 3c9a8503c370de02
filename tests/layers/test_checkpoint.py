"""Attention weights of Hugging Face directories as MLAParams."""

from __future__ import annotations

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import golden_models
from checkpoints import dequantise, quantise, write_checkpoint
from jax_flashmla.layers import IndexerConfig, MLAConfig, MLAParams
from jax_flashmla.layers.checkpoint import attention_shapes, load_attention
from layer_cases import LITE, V3

WIDE = dataclasses.replace(V3, hidden_size=140, q_lora_rank=30)  # more than one block of 128

RNG = np.random.default_rng(0)


def make_tensors(config: MLAConfig, prefix: str) -> dict[str, np.ndarray]:
    return {
        prefix + name: RNG.standard_normal(shape, np.float32)
        for name, shape in attention_shapes(config).items()
    }


def check_params(config: MLAConfig, params: MLAParams, tensors: dict, prefix: str) -> None:
    """Each projection against torch's x @ weight.T, head by head."""
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, MLAParams.shapes(config))
    nope, qk = config.qk_nope_head_dim, config.qk_nope_head_dim + config.qk_rope_head_dim

    def weight(name: str) -> np.ndarray:
        return tensors[f"{prefix}{name}.weight"]

    if config.q_lora_rank is None:
        queries, w_q = weight("q_proj"), params.w_q
    else:
        queries, w_q = weight("q_b_proj"), params.w_uq
        np.testing.assert_array_equal(params.w_dq, weight("q_a_proj").T)
        np.testing.assert_array_equal(params.q_norm, weight("q_a_layernorm"))
    np.testing.assert_array_equal(params.w_dkv, weight("kv_a_proj_with_mqa").T)
    np.testing.assert_array_equal(params.kv_norm, weight("kv_a_layernorm"))
    v = config.v_head_dim
    for h in range(config.num_heads):
        rows = weight("kv_b_proj")[h * (nope + v) : (h + 1) * (nope + v)]
        np.testing.assert_array_equal(w_q[:, h], queries[h * qk : (h + 1) * qk].T)
        np.testing.assert_array_equal(params.w_uk[h], rows[:nope])
        np.testing.assert_array_equal(params.w_uv[h], rows[nope:])
        np.testing.assert_array_equal(params.w_o[h], weight("o_proj")[:, h * v : (h + 1) * v].T)


@pytest.mark.parametrize("shards", [0, 4])
@pytest.mark.parametrize("config", [V3, LITE], ids=["v3", "v2-lite"])
def test_layers_are_loaded_in_the_order_asked_for(tmp_path, config, shards):
    tensors = {}
    for layer in (0, 1, 11):
        tensors |= make_tensors(config, f"model.layers.{layer}.self_attn.")
    directory = write_checkpoint(tmp_path / "model", tensors, shards=shards)
    loaded = load_attention(directory, config, [11, 0], dtype="float32", progress=True)
    for layer, params in zip([11, 0], loaded, strict=True):
        check_params(config, params, tensors, f"model.layers.{layer}.self_attn.")
    (params,) = load_attention(directory, config, [1])
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    rounded = {name: x.astype(jnp.bfloat16) for name, x in tensors.items()}
    check_params(config, params, rounded, "model.layers.1.self_attn.")


def test_float8_layer_is_dequantised(tmp_path):
    prefix = "model.layers.3.self_attn."
    tensors = make_tensors(WIDE, prefix)
    stored, expected = {}, {}
    for name, x in tensors.items():
        if x.ndim == 1:
            stored[name] = expected[name] = x.astype(jnp.bfloat16)
            continue
        stored[name], stored[name + "_scale_inv"] = quantise(x)
        expected[name] = dequantise(stored[name], stored[name + "_scale_inv"])
    directory = write_checkpoint(tmp_path / "model", stored)
    (params,) = load_attention(directory, WIDE, [3], dtype="float32")
    check_params(WIDE, params, expected, prefix)


def test_longcat_has_two_attentions_in_a_layer(tmp_path):
    tensors = make_tensors(V3, "model.layers.1.self_attn.0.")
    tensors |= make_tensors(V3, "model.layers.1.self_attn.1.")
    directory = write_checkpoint(tmp_path / "model", tensors)
    first, second = load_attention(directory, V3, [2, 3], dtype="float32")
    check_params(V3, first, tensors, "model.layers.1.self_attn.0.")
    check_params(V3, second, tensors, "model.layers.1.self_attn.1.")


@pytest.mark.parametrize(
    "prefix", ["model.", "language_model.model.", "model.language_model.", "", "thinker.model."]
)
def test_prefix_is_found(tmp_path, prefix):
    tensors = make_tensors(V3, f"{prefix}layers.1.self_attn.")
    x = np.ones((3, 4), np.float32)
    others = {
        "vision_tower.encoder.layers.0.self_attn.q_proj.weight": x,
        "vision_model.layers.0.self_attn.o_proj.weight": x,
        "lm_head.weight": x,
        # What predicts a further token is no model of its own.
        **make_tensors(LITE, f"{prefix}mtp.layers.0.self_attn."),
    }
    directory = write_checkpoint(tmp_path / "model", tensors | others, shards=2)
    for options in ({}, {"prefix": prefix}):
        (params,) = load_attention(directory, V3, [1], dtype="float32", **options)
        check_params(V3, params, tensors, f"{prefix}layers.1.self_attn.")
    with pytest.raises(ValueError, match=r"prefix must be one that names in .* have before"):
        load_attention(directory, V3, [1], prefix="other.")


def test_ambiguous_prefixes_are_named(tmp_path):
    tensors = make_tensors(V3, "model.layers.0.self_attn.")
    tensors |= make_tensors(LITE, "draft.model.layers.0.self_attn.")
    directory = write_checkpoint(tmp_path / "model", tensors)
    with pytest.raises(ValueError, match=r"prefix must be one of \['draft.model.', 'model.'\]: "):
        load_attention(directory, V3, [0])
    for prefix, config in (("model.", V3), ("draft.model.", LITE)):
        (params,) = load_attention(directory, config, [0], dtype="float32", prefix=prefix)
        check_params(config, params, tensors, f"{prefix}layers.0.self_attn.")


def test_checkpoint_without_latent_attention(tmp_path):
    tensors = {"model.layers.0.self_attn.k_proj.weight": np.ones((3, 4), np.float32)}
    directory = write_checkpoint(tmp_path / "model", tensors)
    with pytest.raises(ValueError, match=r"must have latent attention, .*k_proj.weight'\] and oth"):
        load_attention(directory, V3, [0])


def test_layers_are_numbers_of_layers(tmp_path):
    tensors = make_tensors(V3, "model.layers.1.self_attn.0.")
    tensors |= make_tensors(V3, "model.layers.1.self_attn.1.")
    directory = write_checkpoint(tmp_path / "model", tensors)
    for wrong in (3, None, "3", 2.0, b"3"):
        with pytest.raises(TypeError, match=r"layers must be the numbers of layers, such as range"):
            load_attention(directory, V3, wrong)
    for wrong in (["3"], [2.0], [None]):
        with pytest.raises(TypeError, match="layers must be integers, got"):
            load_attention(directory, V3, wrong)
    for wrong in ([4], range(2, 9), [True], [2**70]):
        with pytest.raises(ValueError, match=r"layers must be between 0 and 3, as .* has 4 layers"):
            load_attention(directory, V3, wrong)
    assert len(list(load_attention(directory, V3, np.array([2, 3])))) == 2
    assert list(load_attention(directory, V3, [])) == []


def test_other_arguments_are_checked(tmp_path):
    directory = write_checkpoint(tmp_path / "model", make_tensors(V3, "model.layers.0.self_attn."))
    with pytest.raises(TypeError, match="config must be an MLAConfig, got PosixPath"):
        load_attention(V3, directory, [0])
    with pytest.raises(TypeError, match="dtype must be floating, got int8"):
        load_attention(directory, V3, [0], dtype="int8")
    with pytest.raises(TypeError, match="prefix must be a string or None, got 3"):
        load_attention(directory, V3, [0], prefix=3)
    with pytest.raises(FileNotFoundError, match="snapshot_download"):
        load_attention("org/name", V3, [0])


def test_scales_that_are_not_used_are_passed_over(tmp_path):
    prefix = "model.layers.0.self_attn."
    tensors = make_tensors(V3, prefix)
    one = np.ones((), np.float32)
    strays = ("k_scale", "v_scale", "attn.k_scale", "o_proj.input_scale", "kv_scale", "q_scale")
    directory = write_checkpoint(
        tmp_path / "model", tensors | {prefix + name: one for name in strays}
    )
    (params,) = load_attention(directory, V3, [0], dtype="float32")
    check_params(V3, params, tensors, prefix)
    tensors[prefix + "o_proj.weight_scale"] = one  # by which weights would be multiplied
    directory = write_checkpoint(tmp_path / "model", tensors)
    with pytest.raises(ValueError, match=r"extra .*o_proj\.weight_scale"):
        load_attention(directory, V3, [0])


def test_one_error_names_the_tensors_of_all_layers(tmp_path):
    tensors = make_tensors(V3, "model.layers.0.self_attn.")
    tensors |= make_tensors(LITE, "model.layers.1.self_attn.")  # another kind
    tensors |= make_tensors(V3, "model.layers.2.self_attn.")
    tensors["model.layers.0.self_attn.kv_b_proj.weight"] = np.ones((3, 4), np.float32)
    tensors["model.layers.0.self_attn.indexer.wk.weight"] = np.ones((3, 4), np.float32)  # allowed
    tensors["model.layers.2.self_attn.surprise"] = np.ones(3, np.float32)  # not asked for
    directory = write_checkpoint(tmp_path / "model", tensors)
    with pytest.raises(ValueError, match="5 tensors") as error:  # before anything is read
        load_attention(directory, V3, [0, 1])
    assert str(error.value).splitlines()[1:] == [
        "  extra model.layers.1.self_attn.q_proj.weight",
        "  missing model.layers.1.self_attn.q_a_layernorm.weight [10]",
        "  missing model.layers.1.self_attn.q_a_proj.weight [10, 24]",
        "  missing model.layers.1.self_attn.q_b_proj.weight [112, 10]",
        "  model.layers.0.self_attn.kv_b_proj.weight must have shape [88, 16], got [3, 4]",
    ]
    with pytest.raises(ValueError, match=r"extra model.layers.2.self_attn.surprise"):
        load_attention(directory, V3, [2])
    with pytest.raises(
        ValueError,
        match=r"layers must be between 0 and 2, .* 3 layers .*, got -1",
    ):
        load_attention(directory, V3, [-1])


INDEXED = dataclasses.replace(
    WIDE,
    indexer=IndexerConfig(num_heads=3, topk=4, rope_layout="half", shared=(False, True, False)),
)


def test_indexers_are_loaded_where_layers_have_them(tmp_path):
    tensors = {}
    for layer in (0, 1, 2, 3):  # the last one predicts a token further ahead
        prefix = f"model.layers.{layer}.self_attn."
        tensors |= make_tensors(INDEXED.for_layer(layer), prefix)
    name = "model.layers.0.self_attn.indexer.wk.weight"
    stored = {k: v for k, v in tensors.items() if k != name}
    stored[name], stored[name + "_scale_inv"] = quantise(tensors[name])
    directory = write_checkpoint(tmp_path / "model", stored)
    first, second, third = load_attention(directory, INDEXED, range(3), dtype=jnp.bfloat16)
    assert second.index_w_q is None
    expected = MLAParams.shapes(INDEXED, jnp.bfloat16)
    for params in (first, third):
        got = jax.tree.map(lambda a: (a.shape, a.dtype), params)
        assert got == jax.tree.map(lambda a: (a.shape, a.dtype), expected)
    assert first.index_w_weights.dtype == jnp.float32
    exact = dequantise(*quantise(tensors[name])).T
    np.testing.assert_array_equal(first.index_w_k, exact.astype(jnp.bfloat16))
    w_q = tensors["model.layers.2.self_attn.indexer.wq_b.weight"]
    (third,) = load_attention(directory, INDEXED, [2], dtype="float32")
    for h in range(3):
        np.testing.assert_array_equal(third.index_w_q[:, h], w_q[h * 128 : (h + 1) * 128].T)
    # The same one twice; and a model that attends to all tokens, without its indexers.
    assert len(list(load_attention(directory, INDEXED, [1, 1]))) == 2
    (dense,) = load_attention(directory, WIDE, [2])
    assert dense.index_w_q is None

    stored["model.layers.1.self_attn.indexer.wk.weight"] = np.ones((128, 140), np.float32)
    del stored["model.layers.2.self_attn.indexer.k_norm.bias"]
    directory = write_checkpoint(tmp_path / "other", stored)
    with pytest.raises(ValueError, match="2 tensors") as error:
        load_attention(directory, INDEXED, range(3))
    assert str(error.value).splitlines()[1:] == [
        "  extra model.layers.1.self_attn.indexer.wk.weight",
        "  missing model.layers.2.self_attn.indexer.k_norm.bias [128]",
    ]


def test_only_the_layer_at_hand_is_read(tmp_path, monkeypatch):
    from jax_flashmla.layers.tensor_reader import TensorReader

    read = []
    original = TensorReader.read

    def recording(self, name, dtype):
        read.append(name)
        return original(self, name, dtype)

    monkeypatch.setattr(TensorReader, "read", recording)
    tensors = make_tensors(V3, "model.layers.0.self_attn.")
    tensors |= make_tensors(V3, "model.layers.1.self_attn.")
    loaded = load_attention(write_checkpoint(tmp_path / "model", tensors), V3, range(2))
    assert read == []
    next(loaded)
    assert len(read) == 7
    assert all(name.startswith("model.layers.0.") for name in read)


def test_progress_is_shown_where_rich_is_installed(tmp_path, monkeypatch, capsys):
    directory = golden_models.GOLDEN / "deepseek_v3"
    config = MLAConfig.from_hf(directory)
    list(load_attention(directory, config, range(2), progress=True))
    assert "attention" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    assert len(list(load_attention(directory, config, range(2), progress=True))) == 2
    assert capsys.readouterr() == ("", "")
