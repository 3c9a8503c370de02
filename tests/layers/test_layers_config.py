"""MLAConfig from published configurations, and rotary embeddings as transformers computes them."""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest

import layer_cases
import tolerances
from hf_configs import (
    DEEPSEEK_YARN,
    GLM,
    KIMI_K2,
    LONGCAT,
    LONGROPE,
    MINICPM3,
    V2_LITE,
    V3,
    without,
)
from jax_flashmla import CacheFormat
from jax_flashmla.layers import LongRopeConfig, MLAConfig, RopeConfig, YarnConfig
from jax_flashmla.layers.rope import inverse_frequencies, rotate

YARN = YarnConfig(factor=40, original_max_positions=4096, mscale=1.0, mscale_all_dim=1.0)
DIMS = {
    "hidden_size": 24,
    "num_heads": 8,
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 8,
    "v_head_dim": 5,
}
FIELDS = (
    "hidden_size",
    "num_heads",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
)


@pytest.mark.parametrize(
    ("hf", "dims", "rope", "sm_scale", "kv_scale"),
    [
        (
            V3,
            (7168, 128, 1536, 512, 128, 64, 128),
            RopeConfig(layout="deinterleaved", yarn=YARN),
            192**-0.5 * (0.1 * math.log(40) + 1) ** 2,
            1.0,
        ),
        (
            {**V3, "model_type": "deepseek_v32", "index_topk": 2048},
            (7168, 128, 1536, 512, 128, 64, 128),
            RopeConfig(layout="deinterleaved", yarn=YARN),
            192**-0.5 * (0.1 * math.log(40) + 1) ** 2,
            1.0,
        ),
        (
            V2_LITE,
            (2048, 16, None, 512, 128, 64, 128),
            RopeConfig(
                layout="interleaved",
                yarn=dataclasses.replace(YARN, mscale=0.707, mscale_all_dim=0.707),
            ),
            192**-0.5 * (0.0707 * math.log(40) + 1) ** 2,
            1.0,
        ),
        (
            KIMI_K2,
            (7168, 64, 1536, 512, 128, 64, 128),
            RopeConfig(
                layout="deinterleaved",
                theta=50000.0,
                yarn=dataclasses.replace(YARN, factor=64.0, beta_fast=1.0),
            ),
            192**-0.5 * (0.1 * math.log(64) + 1) ** 2,
            1.0,
        ),
        (
            GLM,
            (2048, 20, 768, 512, 192, 64, 256),
            RopeConfig(layout="deinterleaved", theta=1e6),
            256**-0.5,
            1.0,
        ),
        (
            LONGCAT,
            (6144, 64, 1536, 512, 128, 64, 128),
            RopeConfig(layout="deinterleaved", theta=1e7),
            192**-0.5 * 2.0,
            12**0.5,
        ),
        (
            MINICPM3,
            (2560, 40, 768, 256, 64, 32, 64),
            RopeConfig(layout="half", longrope=LongRopeConfig(factors=tuple(LONGROPE))),
            96**-0.5,
            1.0,
        ),
    ],
    ids=lambda x: x["model_type"] if isinstance(x, dict) else "",
)
def test_published_models(hf, dims, rope, sm_scale, kv_scale):
    config = MLAConfig.from_hf(hf)
    assert tuple(getattr(config, name) for name in FIELDS) == dims
    assert config.rope == rope
    assert config.sm_scale == pytest.approx(sm_scale, rel=1e-12)
    assert config.kv_scale == pytest.approx(kv_scale, rel=1e-12)
    assert (config.q_norm_eps, config.kv_norm_eps) == (1e-6, 1e-6)
    assert config.d_qk == dims[3] + dims[5]
    assert config.cache_format(jnp.float16, 16) == CacheFormat(
        d_qk=config.d_qk, d_v=dims[3], block_size=16, dtype=jnp.float16
    )
    assert hash(config) == hash(MLAConfig.from_hf(dict(hf)))


def test_names_of_every_release():
    """rope_parameters of transformers 5, which holds rope_theta, and rope_scaling of 4."""
    scaling = {key: value for key, value in DEEPSEEK_YARN.items() if key != "type"}
    new = {key: value for key, value in V3.items() if not key.startswith("rope_")}
    new["rope_parameters"] = {"rope_type": "yarn", "rope_theta": 10000, **scaling}
    assert MLAConfig.from_hf(new) == MLAConfig.from_hf(V3)
    assert MLAConfig.from_hf({**V3, "rope_interleave": False}).rope.layout == "half"
    assert MLAConfig.from_hf({**LONGCAT, "mla_scale_kv_lora": False}).kv_scale == 1
    assert MLAConfig.from_hf({**LONGCAT, "rope_theta": None}).rope.theta == 1e7
    implied = {**DEEPSEEK_YARN, "factor": None}
    assert MLAConfig.from_hf({**V3, "rope_scaling": implied}) == MLAConfig.from_hf(V3)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: RopeConfig(), TypeError, "layout"),
        (lambda: MLAConfig(**DIMS), TypeError, "rope"),
        (lambda: RopeConfig(layout="half", theta=0.5), ValueError, "theta must be at least 1"),
        (lambda: RopeConfig(layout="half", theta=1, yarn=YARN), ValueError, "must be more than 1"),
        (lambda: RopeConfig(layout="half", yarn={}), TypeError, "yarn must be a YarnConfig or"),
        (
            lambda: RopeConfig(layout="half", longrope=[1.0]),
            TypeError,
            "longrope must be a LongRopeConfig or None, got",
        ),
        (lambda: dataclasses.replace(YARN, truncate=1), TypeError, "truncate must be a bool"),
        (
            lambda: dataclasses.replace(YARN, original_max_positions=4096.0),
            TypeError,
            "yarn.original_max_positions",
        ),
        (
            lambda: dataclasses.replace(
                layer_cases.V3,
                rope=RopeConfig(layout="half", yarn=dataclasses.replace(YARN, mscale_all_dim=1e30)),
            ),
            ValueError,
            "sm_scale, which comes from q_scale and rope, must be positive",
        ),
        (lambda: RopeConfig(layout="v3"), ValueError, "rope.layout must be one of"),
        (lambda: RopeConfig(layout="half", theta=0), ValueError, "rope.theta must be positive"),
        (lambda: RopeConfig(layout="half", theta="1"), TypeError, "rope.theta must be a number"),
        (
            lambda: RopeConfig(layout="half", yarn=YARN, longrope=LongRopeConfig(factors=(1.0,))),
            ValueError,
            "yarn or longrope, not both",
        ),
        (
            lambda: YarnConfig(factor=0, original_max_positions=1),
            ValueError,
            "yarn.factor must be positive",
        ),
        (
            lambda: dataclasses.replace(YARN, beta_fast=0.5),
            ValueError,
            "beta_fast must be at least beta_slow = 1.0, got 0.5",
        ),
        (
            lambda: dataclasses.replace(
                layer_cases.V3,
                rope=RopeConfig(layout="half", longrope=LongRopeConfig(factors=(1.0,))),
            ),
            ValueError,
            "must have qk_rope_head_dim / 2 = 4 numbers, got 1",
        ),
        (lambda: dataclasses.replace(layer_cases.V3, rope=None), TypeError, "must be a RopeConfig"),
        (lambda: dataclasses.replace(layer_cases.V3, num_heads=2.0), TypeError, "num_heads"),
        (lambda: dataclasses.replace(layer_cases.V3, kv_norm_eps=0), ValueError, "kv_norm_eps"),
        (lambda: layer_cases.V3.cache_format("int8"), TypeError, "dtype must be bfloat16"),
    ],
)
def test_wrong_configs_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


NOT_POSITIVE = [-1, math.nan, math.inf, 1e-46, 1e39, "1.0", [1.0], True]
YARN_LEAVES = ("factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor")


@pytest.mark.parametrize("value", [0, *NOT_POSITIVE], ids=str)
@pytest.mark.parametrize("leaf", YARN_LEAVES)
def test_leaves_of_yarn_are_checked(leaf, value):
    if value == 0 and leaf.startswith("mscale"):
        assert dataclasses.replace(YARN, **{leaf: 0}).softmax_scale >= 1
        return
    with pytest.raises((TypeError, ValueError), match=f"yarn.{leaf} must be "):
        dataclasses.replace(YARN, **{leaf: value})


@pytest.mark.parametrize("value", [0, *NOT_POSITIVE, None], ids=str)
def test_leaves_of_longrope_are_checked(value):
    with pytest.raises((TypeError, ValueError), match=r"longrope.factors\[1\] must be "):
        LongRopeConfig(factors=(1.0, value))
    if not isinstance(value, list):
        with pytest.raises(TypeError, match=r"longrope.factors must be a tuple"):
            LongRopeConfig(factors=value)
    for leaf in ("attention_factor", "softmax_scale"):
        with pytest.raises((TypeError, ValueError), match=f"longrope.{leaf} must be "):
            LongRopeConfig(factors=(1.0,), **{leaf: value})


def test_numbers_are_stored_as_python_has_them():
    """So that configurations are hashable, and equal ones are one to jit."""
    longrope = LongRopeConfig(factors=[1, np.float32(2)])
    assert longrope == LongRopeConfig(factors=(1.0, 2.0))
    assert hash(longrope) == hash(LongRopeConfig(factors=(1.0, 2.0)))
    yarn = dataclasses.replace(YARN, factor=np.int64(40), original_max_positions=np.int32(4096))
    assert (yarn, hash(yarn)) == (YARN, hash(YARN))
    config = dataclasses.replace(layer_cases.V3, num_heads=np.int16(8), q_scale=np.float32(1))
    assert type(config.num_heads) is int
    assert type(config.q_scale) is float
    assert config == layer_cases.V3


def test_yarn_keeps_fast_pairs_and_stretches_slow_ones():
    """The ends of the ramp, from the paper's rule: pairs that turn more than 32 times in the
    original 4096 tokens stay, those that turn less than once are 40 times slower."""
    config = MLAConfig.from_hf(V3)
    plain = 10000.0 ** (-np.arange(0, 64, 2) / 64)
    turns = 4096 * plain / (2 * np.pi)
    got = inverse_frequencies(config)
    assert got.dtype == np.float32
    kept, stretched = turns > 32 * 1.4, turns < 1 / 1.4  # the ramp's ends are rounded to pairs
    assert kept.sum() > 5
    assert stretched.sum() > 5
    np.testing.assert_allclose(got[kept], plain[kept], rtol=1e-6)
    np.testing.assert_allclose(got[stretched], plain[stretched] / 40, rtol=1e-6)
    ratio = got / plain
    assert (np.diff(ratio) <= 1e-6).all()
    assert ((ratio > 0.03) & (ratio < 0.9)).any()


@pytest.mark.parametrize("name", layer_cases.CONFIGS)
def test_rotation_at_long_positions(name):
    config = layer_cases.CONFIGS[name]
    positions = np.array([[0, 1, 4095, 4096, 32768, 163839]], np.int32)
    x = np.random.default_rng(0).standard_normal((1, 6, 2, config.qk_rope_head_dim), np.float32)
    got = rotate(config, jnp.asarray(x), jnp.asarray(positions))
    for head in range(2):
        expected = layer_cases.naive_rotate(config, x[0, :, head].astype(float), positions[0])
        tolerances.assert_close("rotated", got[0, :, head], expected, tolerances.F32_LAYER)


def test_layouts_hold_the_same_numbers_in_another_order():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 3, 1, 8), np.float32))
    positions = jnp.asarray([[5, 6, 7]], jnp.int32)
    pairs, halves = (
        rotate(dataclasses.replace(layer_cases.V3, rope=RopeConfig(layout=layout)), x, positions)
        for layout in ("interleaved", "deinterleaved")
    )
    np.testing.assert_array_equal(
        jnp.concatenate([pairs[..., ::2], pairs[..., 1::2]], axis=-1), halves
    )


@pytest.mark.parametrize(
    "hf", [V3, V2_LITE, KIMI_K2, GLM, LONGCAT, MINICPM3], ids=lambda hf: hf["model_type"]
)
def test_frequencies_are_those_of_transformers(hf):
    """Where it is installed: frequencies but for the last bit of a power, and scales."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    model_type = hf["model_type"].replace("kimi_k2", "deepseek_v3")
    theirs = transformers.AutoConfig.for_model(model_type, **without(hf, "model_type"))
    config = MLAConfig.from_hf(hf)
    assert MLAConfig.from_hf({**theirs.to_dict(), "model_type": hf["model_type"]}) == config
    if config.rope.yarn is None and config.rope.longrope is None:
        return
    parameters = theirs.rope_parameters
    frequencies, scale = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](theirs, "cpu")
    np.testing.assert_allclose(inverse_frequencies(config), frequencies.numpy(), rtol=2**-23)
    mine = config.rope.yarn or config.rope.longrope
    assert scale == pytest.approx(
        mine.rotation_scale if config.rope.yarn else mine.attention_factor
    )
