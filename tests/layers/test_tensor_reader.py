"""Tensors of Hugging Face directories: dtypes, shards, float8 blocks, and bad ones."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from checkpoints import dequantise, quantise, write_checkpoint
from jax_flashmla.layers.tensor_reader import TensorReader

RNG = np.random.default_rng(0)
X = RNG.standard_normal((5, 7), np.float32)


@pytest.mark.parametrize("shards", [0, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_stored_dtypes_are_read_as_they_are(tmp_path, dtype, shards):
    tensors = {name: X.astype(jnp.dtype(dtype)) + i for i, name in enumerate("abcd")}
    reader = TensorReader(write_checkpoint(tmp_path / "model", tensors, shards=shards))
    assert sorted(reader) == list("abcd")
    for name, x in tensors.items():
        assert reader.stored(name).shape == (5, 7)
        got = reader.read(name, dtype)
        assert got.dtype == dtype
        np.testing.assert_array_equal(np.asarray(got), x)
        np.testing.assert_array_equal(reader.read(name, "float32"), x.astype(np.float32))


@pytest.mark.parametrize("shape", [(128, 256), (130, 200), (64, 7), (257, 129)])
def test_float8_blocks_with_ragged_edges_are_dequantised(tmp_path, shape):
    x = RNG.standard_normal(shape, np.float32) * np.linspace(0.1, 3, shape[1], dtype=np.float32)
    values, scales = quantise(x)
    reader = TensorReader(
        write_checkpoint(tmp_path / "model", {"w": values, "w_scale_inv": scales})
    )
    assert reader.stored("w") == ("F8_E4M3", shape)
    got = np.asarray(reader.read("w", jnp.float32))
    np.testing.assert_array_equal(got, dequantise(values, scales))
    # 3 mantissa bits, and subnormals of 2^-9 times a scale of at most the largest value / 448.
    np.testing.assert_allclose(got, x, rtol=2**-4, atol=2**-10 * float(scales.max()))
    for kept, stored in zip(reader.read_float8("w"), (values, scales), strict=True):
        assert kept.dtype == stored.dtype
        np.testing.assert_array_equal(np.asarray(kept), stored)
    rounded = reader.read("w", jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(rounded), got.astype(ml_dtypes.bfloat16))


def test_block_size_comes_from_the_configuration(tmp_path):
    values, scales = quantise(X, (2, 3))
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [2, 3]}}
    tensors = {"w": values, "w_scale_inv": scales}
    reader = TensorReader(write_checkpoint(tmp_path / "model", tensors, config=config))
    got = np.asarray(reader.read("w", jnp.float32))
    np.testing.assert_array_equal(got, dequantise(values, scales, (2, 3)))


def read_with_config(tmp_path, config) -> TensorReader:
    directory = write_checkpoint(tmp_path / "model", {"w": X})
    (directory / "config.json").write_text(json.dumps(config))
    return TensorReader(directory)


@pytest.mark.parametrize(
    "size", [[2, 0], [2], [1, 2, 3], [], 128, "128", {"0": 128}, [True, 1], [2, None], [1.5, 1],
             [2**31, 1], [math.nan, 1], [[128], [128]]], ids=str
)  # fmt: skip
def test_block_size_is_two_positive_integers(tmp_path, size):
    config = {"quantization_config": {"weight_block_size": size}}
    message = r"config\.json: quantization_config\.weight_block_size must be two positive integers"
    with pytest.raises(ValueError, match=message):
        read_with_config(tmp_path, config)
    with pytest.raises(ValueError, match=r"config\.json: text_config\.quantization_config\.weig"):
        read_with_config(tmp_path, {"text_config": config})


@pytest.mark.parametrize("value", [[], [{}], "fp8", 3, False], ids=str)
def test_quantization_is_an_object(tmp_path, value):
    with pytest.raises(ValueError, match=r"config\.json: quantization_config must be an object"):
        read_with_config(tmp_path, {"quantization_config": value})


@pytest.mark.parametrize("config", [[], None, 3, "x"], ids=str)
def test_configuration_is_an_object(tmp_path, config):
    with pytest.raises(ValueError, match=r"config\.json must be a JSON object, got"):
        read_with_config(tmp_path, config)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"quantization_config": None},
        {"quantization_config": {}},
        {"quantization_config": {"weight_block_size": None}},
        {"quantization_config": {"weight_block_size": [128.0, 128]}},
        {"text_config": None},
        {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": {}}},
    ],
    ids=str,
)
def test_nulls_and_what_is_not_read_are_no_errors(tmp_path, config):
    values, scales = quantise(np.tile(X, (30, 30)))
    tensors = {"w": values, "w_scale_inv": scales}
    reader = TensorReader(write_checkpoint(tmp_path / "model", tensors, config=config))
    got = np.asarray(reader.read("w", jnp.float32))
    np.testing.assert_array_equal(got, dequantise(values, scales))


def test_block_size_of_a_wrapped_model(tmp_path):
    values, scales = quantise(X, (2, 3))
    quantization = {"quantization_config": {"weight_block_size": [2, 3]}}
    config = {"model_type": "kimi_k25", "text_config": quantization}
    tensors = {"w": values, "w_scale_inv": scales}
    reader = TensorReader(write_checkpoint(tmp_path / "model", tensors, config=config))
    got = np.asarray(reader.read("w", jnp.float32))
    np.testing.assert_array_equal(got, dequantise(values, scales, (2, 3)))


def test_a_block_may_be_wider_than_the_tensor(tmp_path):
    """Without an array of the block's size."""
    values, scales = quantise(X)
    config = {"quantization_config": {"weight_block_size": [2**31 - 1, 2**31 - 1]}}
    tensors = {"w": values, "w_scale_inv": scales}
    reader = TensorReader(write_checkpoint(tmp_path / "model", tensors, config=config))
    got = np.asarray(reader.read("w", jnp.float32))
    np.testing.assert_array_equal(got, dequantise(values, scales))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e8m0fnu"])
def test_scales_of_other_dtypes(tmp_path, dtype):
    values, scales = quantise(RNG.standard_normal((130, 200), np.float32))
    scales = (2.0 ** np.ceil(np.log2(scales))).astype(jnp.dtype(dtype))  # as e8m0 has them
    tensors = {"w": values, "w_scale_inv": scales}
    reader = TensorReader(write_checkpoint(tmp_path / "model", tensors))
    reader.check({"w": (130, 200)})
    got = np.asarray(reader.read("w", jnp.float32))
    np.testing.assert_array_equal(got, dequantise(values, scales.astype(np.float32)))


def test_scales_of_integers_are_refused(tmp_path):
    values, scales = quantise(X)
    tensors = {"w": values, "w_scale_inv": scales.astype(np.int32)}
    reader = TensorReader(write_checkpoint(tmp_path / "model", tensors))
    with pytest.raises(ValueError, match="w_scale_inv must be of F32, BF16, F16, F8_E8M0, got I32"):
        reader.check({"w": X.shape})
    tensors = {"w": scales.astype(jnp.float8_e8m0fnu)}
    reader = TensorReader(write_checkpoint(tmp_path / "model", tensors))
    with pytest.raises(ValueError, match="w must be of F32, BF16, F16, F8_E4M3, got F8_E8M0"):
        reader.read("w", jnp.float32)


def test_only_float8_is_read_as_such(tmp_path):
    values, _ = quantise(X)
    reader = TensorReader(write_checkpoint(tmp_path / "model", {"w": values, "x": X}))
    with pytest.raises(ValueError, match="x must be of F8_E4M3, got F32"):
        reader.read_float8("x")
    with pytest.raises(ValueError, match=r"missing w_scale_inv \[1, 1\]"):
        reader.read_float8("w")
    with pytest.raises(KeyError, match="has no tensor 'y'"):
        reader.read_float8("y")


def test_one_error_names_all_that_does_not_fit(tmp_path):
    values, scales = quantise(X)
    tensors = {
        "layer.right": X,
        "layer.misshapen": X,
        "layer.integers": X.astype(np.int32),
        "layer.extra": X,
        "layer.ignored": X,
        "layer.eighth": values,
        "layer.eighth_scale_inv": scales,
        "layer.unscaled": values,
        "layer.badly_scaled": values,
        "layer.badly_scaled_scale_inv": np.ones((2, 1), np.float32),
        "layer.cubic": values[None],
        "layer.k_scale": scales,  # of a cache that other programs quantise
        "layer.right.input_scale": np.ones((), np.float32),
        "layer.right_scale_inv": scales,  # of a tensor that needs none
        "elsewhere": X,
    }
    shapes = {f"layer.{name}": (5, 7) for name in ("right", "integers", "eighth", "absent")}
    shapes |= {"layer.misshapen": (7, 5), "layer.unscaled": (5, 7), "layer.badly_scaled": (5, 7)}
    shapes["layer.cubic"] = (1, 5, 7)
    reader = TensorReader(write_checkpoint(tmp_path / "model", tensors, shards=2))
    with pytest.raises(ValueError, match="8 tensors") as error:
        reader.check(shapes, within=r"layer\.", ignore=r"layer\.ignored")
    assert str(error.value).splitlines()[1:] == [
        "  extra layer.extra",
        "  extra layer.right_scale_inv",
        "  layer.badly_scaled_scale_inv must have shape [1, 1], got [2, 1]",
        "  layer.cubic must have rank 2 as F8_E4M3, got [1, 5, 7]",
        "  layer.integers must be of F32, BF16, F16, F8_E4M3, got I32",
        "  layer.misshapen must have shape [7, 5], got [5, 7]",
        "  missing layer.absent [5, 7]",
        "  missing layer.unscaled_scale_inv [1, 1]",
    ]
    reader.check({"layer.right": (5, 7)}, within=r"layer\.right$")
    with pytest.raises(ValueError, match="unscaled_scale_inv"):
        reader.read("layer.unscaled", jnp.float32)
    with pytest.raises(ValueError, match="got I32"):
        reader.read("layer.integers", jnp.float32)


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="must be a folder"):
        TensorReader(tmp_path / "nowhere")
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(FileNotFoundError, match=r"must hold model.safetensors.*pytorch_model.bin"):
        TensorReader(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0not json at all!")
    with pytest.raises(ValueError, match="must be a safetensors file"):
        TensorReader(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{")
    with pytest.raises(ValueError, match="must be JSON"):
        TensorReader(tmp_path)


def test_index_names_files_beside_it(tmp_path):
    directory = write_checkpoint(tmp_path / "model", {"a": X, "b": X}, shards=2)
    (directory / "model-00002-of-00002.safetensors").unlink()
    reader = TensorReader(directory)
    np.testing.assert_array_equal(reader.read("a", jnp.float32), X)  # the other file is not opened
    with pytest.raises(FileNotFoundError, match="00002-of-00002"):
        reader.read("b", jnp.float32)
    with pytest.raises(KeyError, match="no tensor 'c'"):
        reader.read("c", jnp.float32)
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))
    with pytest.raises(ValueError, match=r"weight_map\.a must name a file beside the index, got"):
        TensorReader(directory)


@pytest.mark.parametrize(
    "file", [None, 3, [], {}, "", ".", "..", "/etc/passwd", "a/b", "../model.safetensors", "a\0b"]
)
def test_index_with_a_bad_file_name(tmp_path, file):
    directory = write_checkpoint(tmp_path / "model", {"a": X}, shards=1)
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(ValueError, match=rf"^{index}: weight_map\.a must name a file beside"):
        TensorReader(directory)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({}, "weight_map must be there"),
        ({"weight_map": None}, "weight_map must not be null"),
        ({"weight_map": []}, "weight_map must be an object"),
        ({"weight_map": "model.safetensors"}, "weight_map must be an object"),
        ([], "must be a JSON object"),
        (None, "must be a JSON object"),
    ],
    ids=str,
)
def test_index_of_another_shape(tmp_path, document, message):
    directory = write_checkpoint(tmp_path / "model", {"a": X}, shards=1)
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=rf"^{index}:? .*{message}|^{index}: {message}"):
        TensorReader(directory)


def test_file_that_is_a_folder(tmp_path):
    directory = write_checkpoint(tmp_path / "model", {"a": X}, shards=1)
    (directory / "model-00001-of-00001.safetensors").unlink()
    (directory / "model-00001-of-00001.safetensors").mkdir()
    with pytest.raises(ValueError, match=r"00001\.safetensors must be a safetensors file"):
        TensorReader(directory).check({"a": X.shape})


def test_what_is_no_folder_says_how(tmp_path):
    directory = write_checkpoint(tmp_path / "model", {"a": X})
    with pytest.raises(FileNotFoundError, match=r"got '.*model.safetensors': pass the folder"):
        TensorReader(directory / "model.safetensors")
    with pytest.raises(FileNotFoundError, match=r"snapshot_download\('org/name'\)"):
        TensorReader("org/name")
    for wrong in (3, None, ["model"]):
        with pytest.raises(TypeError, match="directory must be a path, got"):
            TensorReader(wrong)


def test_tensor_that_only_the_index_knows_is_missing(tmp_path):
    directory = write_checkpoint(tmp_path / "model", {"a": X}, shards=1)
    index = directory / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    document["weight_map"]["b"] = document["weight_map"]["a"]
    index.write_text(json.dumps(document))
    with pytest.raises(ValueError, match="missing b"):
        TensorReader(directory).check({"a": (5, 7), "b": (5, 7)})


def test_torch_is_not_needed(tmp_path):
    values, scales = quantise(X)
    write_checkpoint(tmp_path / "model", {"w": values, "w_scale_inv": scales})
    script = (
        "import sys; sys.modules['torch'] = None\n"  # importing it raises
        "from jax_flashmla.layers.tensor_reader import TensorReader\n"
        f"TensorReader({str(tmp_path / 'model')!r}).read('w', 'bfloat16')\n"
    )
    subprocess.run([sys.executable, "-P", "-c", script], check=True)
