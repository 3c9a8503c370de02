"""What of a config.json's rotary embedding is read and refused: YaRN, LongRoPE."""

from __future__ import annotations

import math

import pytest

from hf_configs import DEEPSEEK_YARN, LONGROPE, MINICPM3, V3, without
from jax_flashmla.layers import MLAConfig

NUMBERS = ("factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor")


@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("key", [*NUMBERS, "rope_theta"])
def test_numbers_of_yarn_are_checked(name, key):
    hf = without(V3, "rope_scaling")
    for value in ["1.0", "32", [1.0], {}, False, -1, 0, math.nan, -math.inf, 1e39, 10**400]:
        scaling = {**DEEPSEEK_YARN, key: value}
        if key.startswith("mscale") and value == 0 and value is not False:
            assert MLAConfig.from_hf({**hf, name: scaling}).rope.yarn.mscale >= 0
            continue
        error = NotImplementedError if value == {} else ValueError  # {}: as if by layer type
        with pytest.raises(error, match=rf"^config: {name}") as raised:
            MLAConfig.from_hf({**hf, name: scaling})
        assert key in str(raised.value)
    null = MLAConfig.from_hf({**hf, name: {**DEEPSEEK_YARN, key: None}})
    assert null == MLAConfig.from_hf({**hf, name: without(DEEPSEEK_YARN, key)})


def test_lengths_may_be_floats():
    key = "original_max_position_embeddings"
    whole = {**DEEPSEEK_YARN, key: 4096.0}
    assert MLAConfig.from_hf({**V3, "rope_scaling": whole}) == MLAConfig.from_hf(V3)
    implied = {**whole, "factor": None}
    assert MLAConfig.from_hf(
        {**V3, "max_position_embeddings": 163840.0, "rope_scaling": implied}
    ) == MLAConfig.from_hf(V3)
    for value in (4096.5, "4096", [4096], True, 0, math.nan):
        with pytest.raises(ValueError, match=rf"rope_scaling.{key} must be an integer"):
            MLAConfig.from_hf({**V3, "rope_scaling": {**DEEPSEEK_YARN, key: value}})


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("value", ["yarn", [], [DEEPSEEK_YARN], "", 0, False, 4.0], ids=str)
def test_scaling_is_an_object(key, value):
    with pytest.raises(ValueError, match=f"^config: {key} must be an object, got"):
        MLAConfig.from_hf({**without(V3, "rope_scaling"), key: value})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("short_factor", "1", "must be a list of numbers"),
        ("short_factor", 1.0, "must be a list of numbers"),
        ("short_factor", [0.0] * 16, r"short_factor\[0\] must be a number between"),
        ("short_factor", [*LONGROPE[:-1], -1], r"short_factor\[15\] must be a number between"),
        ("long_factor", [*LONGROPE[:-1], math.nan], r"long_factor\[15\] must be a number between"),
        ("long_factor", ["1.0"] * 16, r"long_factor\[0\] must be a number between"),
        ("long_factor", None, "long_factor must not be null"),
        ("short_factor", LONGROPE[1:], "factors must have qk_rope_head_dim / 2 = 16 numbers"),
        ("short_factor", [], "factors must have qk_rope_head_dim / 2 = 16 numbers"),
        ("factor", "2", "rope_scaling.factor must be a number"),
        ("attention_factor", -1, "rope_scaling.attention_factor must be a number"),
    ],
)
def test_longrope_is_checked(key, value, message):
    with pytest.raises(ValueError, match=message):
        MLAConfig.from_hf({**MINICPM3, "rope_scaling": {**MINICPM3["rope_scaling"], key: value}})


def test_longrope_scales_the_softmax_as_transformers_does():
    """(0.1 mscale_all_dim ln(factor) + 1)^2, whatever the type, where there is one."""
    scaling = {
        **MINICPM3["rope_scaling"],
        "short_factor": [1.0] * 4,
        "long_factor": [1.0] * 4,
        "factor": 2.0,
        "mscale_all_dim": 1.0,
    }
    hf = {**MINICPM3, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "rope_scaling": scaling}
    config = MLAConfig.from_hf(hf)
    assert config.sm_scale == pytest.approx(0.2859, abs=5e-5)
    assert config.sm_scale == pytest.approx(16**-0.5 * (0.1 * math.log(2) + 1) ** 2, rel=1e-12)
    assert config.rope.longrope.attention_factor == pytest.approx(
        math.sqrt(1 + math.log(2) / math.log(32768)), rel=1e-12
    )
    shorter = {**hf, "rope_scaling": {**scaling, "factor": 1.0}}
    assert MLAConfig.from_hf(shorter).sm_scale == 0.25
    with pytest.raises(ValueError, match=r"rope_scaling\.factor must be there"):
        MLAConfig.from_hf({**hf, "rope_scaling": without(scaling, "factor")})
    plain = {"rope_type": "default", "mscale_all_dim": 1.0, "factor": 2.0}
    assert MLAConfig.from_hf({**hf, "rope_scaling": plain}).sm_scale == 0.25
    unscaled = without(scaling, "mscale_all_dim")
    assert MLAConfig.from_hf({**hf, "rope_scaling": unscaled}).sm_scale == 0.25
