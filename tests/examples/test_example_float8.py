"""The example's weights in float8: as stored until they are used, over several devices too."""

from __future__ import annotations

import json
import math
import pathlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

import generate
import golden_models
import hf_configs
from checkpoints import dequantise, quantise, write_checkpoint
from deepseek.config import ModelConfig
from deepseek.devices import connect, share
from deepseek.float8 import Float8
from deepseek.model import DeepSeek
from deepseek.moe import Experts
from deepseek.weights import load_model
from example_models import load, logits_of

pytestmark = pytest.mark.usefixtures("on_cpu")

V3 = golden_models.GOLDEN / "deepseek_v3"
GUIDE = pathlib.Path(__file__).parents[2] / "docs" / "guides" / "sharding.md"
BLOCK = 24, 10  # cut off at the edges of matrices of 16 x 32 and 48 x 32
V32_MODEL = {
    "vocab_size": 129280,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 3,
}
NOT_FLOAT8 = "model.layers.1.mlp.experts.3.down_proj.weight"


def twins(directory: pathlib.Path, block: tuple[int, int]) -> tuple[pathlib.Path, pathlib.Path]:
    """The golden V3 model with projections in float8 blocks, and with what these stand for."""
    stored, twin = {}, {}
    for name, x in safetensors.numpy.load_file(V3 / "model.safetensors").items():
        if "proj" in name and name != NOT_FLOAT8:
            stored[name], stored[name + "_scale_inv"] = quantise(x, block)
            twin[name] = dequantise(stored[name], stored[name + "_scale_inv"], block)
        else:
            stored[name] = twin[name] = x
    assert sum(x.dtype == "float8_e4m3fn" for x in stored.values()) > 30
    config = json.loads((V3 / "config.json").read_text())
    quantization = {"quant_method": "fp8", "weight_block_size": list(block)}
    return (
        write_checkpoint(
            directory / "float8",
            stored,
            config={**config, "quantization_config": quantization},
            shards=3,
        ),
        write_checkpoint(directory / "twin", twin, config=config),
    )


def test_model_equals_its_dequantised_twin(tmp_path):
    dtype, tokens = "bfloat16", golden_models.load(V3)["tokens"][:20]
    float8, twin = twins(tmp_path, BLOCK)
    config, model = load(float8, dtype)
    dense, sparse = (layer.mlp for layer in model.layers)
    for mlp in (dense, sparse.experts, sparse.shared_experts):
        for name in ("gate_proj", "up_proj", "down_proj"):
            value = getattr(mlp, name).get_value()
            mixed = mlp is sparse.experts and name == "down_proj"
            assert isinstance(value, jax.Array if mixed else Float8)
    np.testing.assert_array_equal(
        logits_of(config, model, tokens, 18, dtype=dtype),
        logits_of(*load(twin, dtype), tokens, 18, dtype=dtype),
    )


def test_devices_share_out_values_and_scales(tmp_path, capsys):
    float8, twin = twins(tmp_path, (128, 128))
    config = ModelConfig.from_directory(float8)
    model = load_model(float8, config, dtype=jnp.float32, peers=connect(2, config))
    gate = model.layers[1].mlp.experts.gate_proj.get_value()  # 8 experts, each of one block
    assert gate.values.dtype == jnp.float8_e4m3fn
    assert [shard.data.shape for shard in gate.values.addressable_shards] == [(8, 32, 8)] * 2
    assert [shard.data.shape for shard in gate.scales.addressable_shards] == [(8, 1, 1)] * 2

    def text(directory: pathlib.Path, *options: str) -> str:
        arguments = ["--checkpoint", str(directory), "--dtype", "float32", "--prompt", "The"]
        assert generate.main([*arguments, "--max-new-tokens", "24", *options]) == 0
        return capsys.readouterr().out

    assert text(float8, "--devices", "2") == text(twin)


@pytest.mark.parametrize(
    ("shape", "parts", "block", "grid"),
    [
        ((256, 512), 2, (128, 128), (2, 4)),  # as in the checkpoint
        ((200, 300), 3, (128, 128), (25, 75)),  # blocks of 8 x 4
        ((7, 130), 2, (24, 10), (7, 26)),
        ((2, 3), 1, (1, 1000), (2, 3)),
    ],
)
def test_each_share_is_dequantised_by_itself(shape, parts, block, grid):
    x = np.random.default_rng(0).standard_normal(shape, np.float32)
    values, scales = quantise(x, block)
    share = shape[0], shape[1] // parts
    weights = Float8.from_checkpoint(jnp.asarray(values), jnp.asarray(scales), block, share)
    assert weights.scales.shape == grid
    expected = dequantise(values, scales, block)
    for i, columns in enumerate(np.split(expected, parts, axis=1)):
        part = jax.tree.map(lambda w, i=i: np.split(w, parts, axis=1)[i], weights)
        np.testing.assert_array_equal(part.astype(jnp.float32), columns)
        rounded = np.asarray(part.astype(jnp.bfloat16))
        np.testing.assert_array_equal(rounded, columns.astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize("tokens", [2, 100])
def test_step_widens_a_few_experts_at_a_time(tokens):
    experts = nnx.eval_shape(lambda: Experts(128, 128, "bfloat16", nnx.Rngs(0), 512))
    graph, state = nnx.split(experts)
    for _, parameter in nnx.to_flat_state(state):
        values = jax.ShapeDtypeStruct((512, 128, 128), "float8_e4m3fn")
        parameter.set_value(Float8(values, jax.ShapeDtypeStruct((512, 1, 1), "float32")))
    arguments = [
        jax.ShapeDtypeStruct((tokens, n), dtype)
        for n, dtype in ((128, "bfloat16"), (3, "float32"), (3, "int32"))
    ]
    step = jax.jit(lambda state, *arguments: nnx.merge(graph, state)(*arguments))
    memory = step.lower(state, *arguments).compile().memory_analysis()
    stored = 3 * 512 * 128 * 128
    assert stored < memory.argument_size_in_bytes < 1.1 * stored
    assert memory.temp_size_in_bytes < 0.5 * stored


def test_guide_says_what_v32_takes_on_eight_devices(tmp_path):
    """Of its 61 layers, 3 are dense and 58 are like the fourth."""
    hf = {**hf_configs.V32, **V32_MODEL, "num_hidden_layers": 4}
    (tmp_path / "config.json").write_text(json.dumps(hf))
    config = ModelConfig.from_directory(tmp_path)
    peers = connect(8, config)
    model = nnx.eval_shape(lambda: DeepSeek(config, dtype="bfloat16", rngs=nnx.Rngs(0)))
    total = {"float8": 0.0, "bfloat16": 0.0}
    for path, parameter in nnx.to_flat_state(nnx.state(model)):
        x = parameter.get_value()
        size = math.prod(share(config, peers, path, x.shape)) * (58 if 3 in path else 1)
        is_float8 = path[-1] in ("gate_proj", "up_proj", "down_proj")
        total["float8"] += size * (1 + 4 / 128**2 if is_float8 else x.dtype.itemsize)
        total["bfloat16"] += size * x.dtype.itemsize
    assert f"{total['float8'] / 1e9:.0f} GB on each of eight devices" in GUIDE.read_text()
    assert f"{total['bfloat16'] / 1e9:.0f} GB in 16 bits" in GUIDE.read_text()
