"""Damaged files of Hugging Face models: the right result, or an error that names the cause."""

from __future__ import annotations

import copy
import json
import math
import struct

import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import layer_cases
from checkpoints import write_checkpoint
from hf_configs import PUBLISHED
from jax_flashmla.layers import MLAConfig
from jax_flashmla.layers.checkpoint import attention_shapes, load_attention
from jax_flashmla.layers.rope import inverse_frequencies
from jax_flashmla.layers.tensor_reader import TensorReader

ALLOWED = (ValueError, TypeError, NotImplementedError)
QUICK = settings(
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def says(error: Exception, *causes: str) -> None:
    assert any(cause in str(error) for cause in causes), error


LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, -1, 1, 2, 64, 0.5, 4096.0, 1e-46, 1e39, 1e308, 2**31, 2**63, 10**400]),
    st.integers(),
    st.floats(),
    st.text(max_size=4),
    st.sampled_from(["yarn", "longrope", "default", "deepseek_v3", "full_attention"]),
)
JSON = st.recursive(
    LEAVES,
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=6), x, max_size=3),
    max_leaves=6,
)
KEYS = sorted({key for hf in PUBLISHED.values() for key in hf} | {
    "architectures", "text_config", "language_config", "rope_parameters", "qk_head_dim", "head_dim",
    "rope_interleave", "layer_types", "sliding_window", "use_mla",
    "original_max_position_embeddings", "partial_rotary_factor",
    "attention_bias", "llama_4_scaling",
})  # fmt: skip
ROPE_KEYS = [
    "type", "rope_type", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow",
    "mscale", "mscale_all_dim", "attention_factor", "truncate", "rope_theta", "short_factor",
    "long_factor", "partial_rotary_factor", "llama_4_scaling_beta",
]  # fmt: skip


@st.composite
def damaged_configs(draw):
    hf = copy.deepcopy(draw(st.sampled_from(list(PUBLISHED.values()))))
    for _ in range(draw(st.integers(0, 3))):
        place, keys = hf, KEYS
        if isinstance(hf.get("rope_scaling"), dict) and draw(st.booleans()):
            place, keys = hf["rope_scaling"], ROPE_KEYS
        key = draw(st.sampled_from(keys))
        action = draw(st.sampled_from(["drop", "set", "wrap"]))
        if action == "drop":
            place.pop(key, None)
        elif action == "set":
            place[key] = draw(JSON)
        else:
            place[key] = [place.get(key)]
    if draw(st.booleans()):
        hf = {draw(st.sampled_from(["text_config", "language_config"])): hf}
    return hf


@QUICK
@given(damaged_configs())
def test_configurations(hf):
    try:
        config = MLAConfig.from_hf(hf)
    except ALLOWED as error:
        says(error, "config: ")
        return
    if "kv_lora_rank" not in hf:
        hf = hf.get("text_config") or hf["language_config"]
    assert config.hidden_size == hf["hidden_size"]
    assert config.kv_lora_rank == hf["kv_lora_rank"]
    assert hash(config) == hash(copy.deepcopy(config))
    assert 0 < config.sm_scale < math.inf
    if config.qk_rope_head_dim < 1024:
        frequencies = inverse_frequencies(config)
        assert frequencies.shape == (config.qk_rope_head_dim // 2,)
        assert np.isfinite(frequencies).all()


@QUICK
@given(JSON)
def test_whole_documents(tmp_path, document):
    (tmp_path / "config.json").write_text(json.dumps(document))
    try:
        MLAConfig.from_hf(tmp_path)
        raise AssertionError(f"{document} is no model")
    except ALLOWED as error:
        says(error, str(tmp_path / "config.json"))


@QUICK
@given(quantization=JSON, size=JSON)
def test_quantization(tmp_path, quantization, size):
    directory = write_checkpoint(tmp_path / "model", {"a": np.ones((2, 3), np.float32)})
    for value in (quantization, {"weight_block_size": size}):
        (directory / "config.json").write_text(json.dumps({"quantization_config": value}))
        try:
            TensorReader(directory).check({"a": (2, 3)})
        except ValueError as error:
            says(error, "config.json: quantization_config")


@QUICK
@given(weight_map=st.dictionaries(st.sampled_from("abc"), LEAVES, max_size=3) | JSON, whole=JSON)
def test_indexes(tmp_path, weight_map, whole):
    directory = write_checkpoint(tmp_path / "model", {"a": np.ones(2, np.float32)}, shards=1)
    for document in ({"weight_map": weight_map}, whole):
        index = directory / "model.safetensors.index.json"
        index.write_text(json.dumps(document))
        try:
            TensorReader(directory).check({"a": (2,)})
            raise AssertionError("no such index names the file")
        except FileNotFoundError as error:  # a name that is well-formed
            says(error, "which the index names, is missing")
        except ValueError as error:
            says(error, str(directory))


CONFIG = layer_cases.LITE
TENSORS = {
    f"model.layers.0.self_attn.{name}": np.ones(shape, np.float32)
    for name, shape in attention_shapes(CONFIG).items()
}


def load(directory) -> None:
    try:
        (params,) = load_attention(directory, CONFIG, [0], dtype=jnp.float32)
    except ValueError as error:
        says(error, str(directory), "model.layers")
        return
    assert params.w_uk.shape == (CONFIG.num_heads, CONFIG.qk_nope_head_dim, CONFIG.kv_lora_rank)


@QUICK
@given(st.lists(st.tuples(st.integers(0, 900), st.integers(0, 255)), max_size=4), st.integers(0))
def test_bytes_of_headers(tmp_path, changes, cut):
    """Bytes changed, and the file cut off somewhere."""
    directory = write_checkpoint(tmp_path / "model", TENSORS)
    file = directory / "model.safetensors"
    content = bytearray(file.read_bytes())
    for at, byte in changes:
        content[at] = byte
    file.write_bytes(content[: cut % (2 * len(content))])
    load(directory)


@QUICK
@given(st.sampled_from(sorted(TENSORS)), st.sampled_from(["dtype", "shape", "data_offsets"]), JSON)
def test_leaves_of_headers(tmp_path, name, key, value):
    directory = write_checkpoint(tmp_path / "model", {"a": np.ones(2, np.float32)})
    content = safetensors.numpy.save(TENSORS)
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    header[name][key] = value
    changed = json.dumps(header).encode()
    file = directory / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(changed)) + changed + content[8 + length :])
    load(directory)
