"""The nnx and linen modules: the functions' numbers, under their frameworks' transforms."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import layer_cases
import tolerances
from jax_flashmla.layers import MLAParams, absorb, decode, linen, prefill
from jax_flashmla.layers import nnx as layers_nnx
from layer_cases import LITE, V3

pytestmark = pytest.mark.usefixtures("on_cpu")

NAMES = {field.name for field in dataclasses.fields(MLAParams) if "index" not in field.name}
LAYERS = 3


def as_variables(params: MLAParams) -> dict:
    return {"params": {name: a for name, a in vars(params).items() if a is not None}}


@pytest.mark.parametrize("config", [V3, LITE], ids=["v3", "v2-lite"])
def test_modules_compute_what_the_functions_do(config):
    params = layer_cases.make_params(config)
    x = jnp.asarray(layer_cases.make_x(config, 2, 7))
    cache = layer_cases.make_cache(config, [20, 20])
    module = layers_nnx.MLAttention(config, params=params)
    other = linen.MLAttention(config)
    filled, slots = cache.advance(7)
    expected = jax.jit(lambda c, x: prefill(config, params, x, c, slots=slots, prefix=False))(
        filled, x
    )
    got = nnx.jit(lambda m, c, x: m.prefill(x, c, slots=slots, prefix=False))(module, filled, x)
    assert_same(got, expected)
    got = jax.jit(
        lambda v, c, x: other.apply(v, x, c, slots=slots, prefix=False, method="prefill")
    )(as_variables(params), filled, x)
    assert_same(got, expected)

    filled, slots = expected[0].advance(2)
    x = x[:, :2]
    absorbed = absorb(config, params)
    expected = jax.jit(lambda c, x: decode(config, params, x, c, slots=slots, absorbed=absorbed))(
        filled, x
    )
    got = nnx.jit(lambda m, c, x: m.decode(x, c, slots=slots, absorbed=absorbed))(module, filled, x)
    assert_same(got, expected)
    got = jax.jit(
        lambda v, c, x: other.apply(v, x, c, slots=slots, absorbed=absorbed, method="decode")
    )(as_variables(params), filled, x)
    assert_same(got, expected)


def assert_same(got, expected):
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.parametrize("kind", ["nnx", "linen"])
def test_mixed_precision(kind):
    """float32 parameters, computation and cache in bfloat16."""
    x = jnp.asarray(layer_cases.make_x(V3, 1, 9))
    cache, slots = layer_cases.make_cache(V3, [9], dtype="bfloat16").advance(9)
    if kind == "nnx":
        module = layers_nnx.MLAttention(V3, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
        params = module.params
        _, y = module.decode(x, cache, slots=slots)
    else:
        module = linen.MLAttention(V3, dtype=jnp.bfloat16)
        variables = module.init(jax.random.key(0), x, cache, slots=slots, method="decode")
        params = MLAParams(**variables["params"])
        _, y = module.apply(variables, x, cache, slots=slots, method="decode")
    assert {a.dtype for a in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    assert y.dtype == jnp.bfloat16
    expected, _ = layer_cases.naive_layer(V3, params, np.asarray(x[0]))
    tolerances.assert_close("y", y[0], expected, tolerances.BF16_LAYER)


def naive_stack(x, stacked: MLAParams) -> np.ndarray:
    """LAYERS residual layers over one sequence x [tokens, hidden]."""
    x = np.asarray(x, np.float64)
    for n in range(LAYERS):
        x = x + layer_cases.naive_layer(V3, jax.tree.map(lambda a, n=n: a[n], stacked), x)[0]
    return x


def test_nnx_scan_over_layers():
    @nnx.split_rngs(splits=LAYERS)
    @nnx.vmap(transform_metadata={nnx.PARTITION_NAME: None})
    def create(rngs):
        return layers_nnx.MLAttention(V3, heads_axis="model", rngs=rngs)

    mesh = jax.make_mesh(
        (8,),
        ("model",),
        axis_types=(jax.sharding.AxisType.Auto,),
        devices=jax.devices("cpu"),
    )
    with jax.set_mesh(mesh):
        stack = create(nnx.Rngs(0))
    assert stack.w_uk.out_sharding == (None, "model", None, None)
    cache, slots = layer_cases.make_cache(V3, [6, 6], layers=LAYERS).advance(6)

    @nnx.jit
    def run(stack, cache, x):
        @nnx.scan(
            in_axes=(0, 0, nnx.Carry),
            out_axes=nnx.Carry,
            transform_metadata={nnx.PARTITION_NAME: None},
        )
        def layer(module, i, carry):
            cache, x = carry
            cache, y = module.decode(x, cache, slots=slots, layer=i)
            return cache, x + y

        return layer(stack, jnp.arange(LAYERS), (cache, x))

    x = jnp.asarray(layer_cases.make_x(V3, 2, 6))
    cache, got = run(stack, cache, x)
    for i in range(2):
        expected = naive_stack(x[i], stack.params)
        tolerances.assert_close("x", got[i], expected, tolerances.F32_LAYER)


class Block(nn.Module):
    """A residual layer whose carry is (cache, x)."""

    @nn.compact
    def __call__(self, carry, i, slots):
        cache, x = carry
        attention = linen.MLAttention(V3, heads_axis="model", name="attention")
        cache, y = attention.decode(x, cache, slots=slots, layer=i)
        return (cache, x + y), None


def test_linen_scan_over_layers():
    stack = nn.scan(
        Block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(0, nn.broadcast),
        length=LAYERS,
        metadata_params={nn.PARTITION_NAME: None},
    )()
    cache, slots = layer_cases.make_cache(V3, [6, 6], layers=LAYERS).advance(6)
    x = jnp.asarray(layer_cases.make_x(V3, 2, 6))
    arguments = (cache, x), jnp.arange(LAYERS), slots
    variables = stack.init(jax.random.key(0), *arguments)
    specs = nn.get_partition_spec(variables)["params"]["attention"]
    assert specs["w_uk"] == P(None, "model", None, None)
    variables = nn.unbox(variables)
    (_, got), _ = jax.jit(stack.apply)(variables, *arguments)
    params = MLAParams(**variables["params"]["attention"])
    for i in range(2):
        expected = naive_stack(x[i], params)
        tolerances.assert_close("x", got[i], expected, tolerances.F32_LAYER)


def test_parameters_are_named_and_partitioned():
    with nnx.use_eager_sharding(False):
        module = layers_nnx.MLAttention(LITE, heads_axis="model", rngs=nnx.Rngs(0))
    state = nnx.state(module, nnx.Param)
    assert {path[0] for path, _ in nnx.to_flat_state(state)} == NAMES - {"w_dq", "q_norm", "w_uq"}
    specs = MLAParams.specs(LITE, "model")
    assert specs.w_q == P(None, "model", None)
    assert specs.w_o == P("model", None, None)
    assert specs.w_dkv == P(None, None)
    partition = nnx.get_partition_spec(state)
    for name in ("w_q", "w_uk", "w_uv", "w_o", "w_dkv", "kv_norm"):
        assert partition[name].get_value() == getattr(specs, name)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=lambda t: t.name)
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])  # the module's: as it is, and cast
@pytest.mark.parametrize("where", ["uncommitted", "committed", "host", "sharded"])
def test_given_parameters_are_sharded_wherever_they_are(where, stored, axis_type):
    devices = jax.devices("cpu")
    mesh = jax.make_mesh((8,), ("model",), axis_types=(axis_type,), devices=devices)
    params, specs = layer_cases.make_params(V3), MLAParams.specs(V3, "model")
    if where == "committed":
        params = jax.device_put(params, devices[1])
    elif where == "host":
        params = jax.tree.map(np.asarray, params)
    elif where == "sharded":
        params = jax.tree.map(lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), params, specs)
    with jax.set_mesh(mesh):
        module = layers_nnx.MLAttention(V3, heads_axis="model", param_dtype=stored, params=params)
    for name, spec in vars(specs).items():
        if spec is not None:
            got, expected = getattr(module, name)[...], getattr(params, name)
            assert got.sharding.is_equivalent_to(NamedSharding(mesh, spec), got.ndim), name
            np.testing.assert_array_equal(got, np.asarray(expected).astype(stored))


def test_wrong_arguments():
    params = layer_cases.make_params(V3)
    with pytest.raises(ValueError, match="must be given params or rngs"):
        layers_nnx.MLAttention(V3)
    with pytest.raises(ValueError, match=r"params\.w_dq must be"):
        layers_nnx.MLAttention(V3, params=layer_cases.make_params(LITE))
    with pytest.raises(TypeError, match=r"rngs must be an nnx\.Rngs or None, got int"):
        layers_nnx.MLAttention(V3, rngs=0)
    x = jnp.asarray(layer_cases.make_x(V3, 1, 1))
    cache, slots = layer_cases.make_cache(V3, [1]).advance(1)
    for config, options, message in (
        (None, {}, "config must be an MLAConfig, got NoneType"),
        (V3, {"param_dtype": jnp.int8}, "param_dtype must be floating, got .*int8"),
        (V3, {"param_dtype": None}, "param_dtype must be floating, got None"),
        (V3, {"dtype": "float33"}, "dtype must be floating, got float33"),
        (V3, {"dtype": jnp.int32}, "dtype must be floating, got .*int32"),
        (V3, {"heads_axis": ("x", "y")}, r"heads_axis must be a mesh axis's name or None, got \("),
        (V3, {"peers": "model"}, "peers must be Peers or None, got str"),
    ):
        with pytest.raises(TypeError, match=message):
            layers_nnx.MLAttention(config, params=params, **options)
        with pytest.raises(TypeError, match=message):
            linen.MLAttention(config, **options).apply(
                as_variables(params), x, cache, slots=slots, method="decode"
            )
