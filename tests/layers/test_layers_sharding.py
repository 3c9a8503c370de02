"""Layers under tensor parallelism: one sum over the devices for each, and the cache stays put."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import layer_cases
import tolerances
from jax_flashmla import PagedCache
from jax_flashmla.layers import MLAParams, absorb, decode, linen, prefill
from jax_flashmla.layers import nnx as layers_nnx
from layer_cases import LITE, V3

pytestmark = pytest.mark.usefixtures("on_cpu")

LAYERS, PROMPT, STEP = 2, 7, 2
OPERATION = re.compile(r"= \(?(\w+\[[\d,]*\])\S* ([\w-]+)\(")  # result's type, name
MOVES = {"all-gather", "all-to-all", "collective-permute", "reduce-scatter", "copy", "copy-start"}


def make_mesh(axis_type: AxisType = AxisType.Auto, **axes: int) -> Mesh:
    return jax.make_mesh(
        tuple(axes.values()),
        tuple(axes),
        axis_types=(axis_type,) * len(axes),
        devices=jax.devices("cpu"),
    )


def put(tree, mesh: Mesh, specs):
    return jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), tree, specs)


def operations(compiled) -> list[tuple[str, str]]:
    return OPERATION.findall(compiled.as_text())


def assert_one_sum_a_layer(compiled, cache: PagedCache, *, cache_shards: int = 1) -> None:
    found = operations(compiled)
    names = [name for _, name in found]
    assert names.count("all-reduce") == LAYERS
    assert not MOVES - {"copy", "copy-start"} & set(names)
    num_blocks, *rest = cache.blocks.shape
    local = f"f32[{','.join(map(str, (num_blocks // cache_shards, *rest)))}]"
    of_cache = {name for type_, name in found if type_ == local}
    # The types are those looked for; latent_append, which has two results, is there by its parts.
    assert of_cache & {"custom-call", "get-tuple-element"}
    assert not of_cache & MOVES


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=lambda t: t.name)
@pytest.mark.parametrize("config", [V3, LITE], ids=["v3", "v2-lite"])
def test_heads_over_eight_devices(config, axis_type: AxisType) -> None:
    mesh = make_mesh(axis_type, model=8)
    params = layer_cases.make_params(config)
    param_specs = MLAParams.specs(config, "model")
    sharded = put(params, mesh, param_specs)
    x = jnp.asarray(layer_cases.make_x(config, 2, PROMPT + STEP))
    cache = layer_cases.make_cache(config, [10, 10], layers=LAYERS)
    cache_specs = jax.tree.map(lambda _: P(), cache)

    def layers(function: Callable, axis: str | None, params, cache, x):
        cache, slots = cache.advance(x.shape[1])
        for i in range(LAYERS):
            cache, y = function(config, params, x, cache, slots=slots, layer=i, heads_axis=axis)
            x = x + y
        return cache, x

    here = (cache, None)
    other = layer_cases.make_cache(config, [10, 10], layers=LAYERS)  # to be donated
    there = (put(other, mesh, cache_specs), None)
    for function, tokens in ((prefill, x[:, :PROMPT]), (decode, x[:, PROMPT:])):
        parallel = jax.jit(
            jax.shard_map(
                lambda *arguments, function=function: layers(function, "model", *arguments),
                mesh=mesh,
                in_specs=(param_specs, cache_specs, P()),
                out_specs=(cache_specs, P()),
            ),
            donate_argnums=1,
        )
        arguments = sharded, there[0], put(tokens, mesh, P())
        assert_one_sum_a_layer(parallel.lower(*arguments).compile(), cache)
        there = parallel(*arguments)
        here = layers(function, None, params, here[0], tokens)
        tolerances.assert_close("x", there[1], here[1], tolerances.F32_LAYER)
        for sequence in range(2):
            for layer in range(LAYERS):
                rows = layer_cases.cached_rows(there[0], sequence, layer)
                expected = layer_cases.cached_rows(here[0], sequence, layer)
                tolerances.assert_close("rows", rows, expected, tolerances.F32_LAYER)


def test_sequences_and_heads_over_two_axes() -> None:
    """Each device of the batch's axis has its own sequences, blocks and block ids."""
    mesh = make_mesh(data=2, model=4)
    params = layer_cases.make_params(V3)
    param_specs = MLAParams.specs(V3, "model")
    x = jnp.asarray(layer_cases.make_x(V3, 4, 5))
    parts = [layer_cases.make_cache(V3, [10, 10], layers=LAYERS) for _ in range(2)]
    cache = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)
    cache_specs = jax.tree.map(lambda _: P("data"), cache)

    def layers(params, cache, x):
        cache, slots = cache.advance(5)
        for i in range(LAYERS):
            weights = absorb(V3, params) if i else None
            cache, y = decode(
                V3, params, x, cache, slots=slots, layer=i, heads_axis="model", absorbed=weights
            )
            x = x + y
        return cache, x

    parallel = jax.jit(
        jax.shard_map(
            layers,
            mesh=mesh,
            in_specs=(param_specs, cache_specs, P("data")),
            out_specs=(cache_specs, P("data")),
        ),
        donate_argnums=1,
    )
    arguments = (
        put(params, mesh, param_specs),
        put(cache, mesh, cache_specs),
        put(x, mesh, P("data")),
    )
    assert_one_sum_a_layer(parallel.lower(*arguments).compile(), cache, cache_shards=2)
    _, got = parallel(*arguments)
    for i in range(4):
        expected = np.asarray(x[i], np.float64)
        for _ in range(LAYERS):
            expected = expected + layer_cases.naive_layer(V3, params, expected)[0]
        tolerances.assert_close("x", got[i], expected, tolerances.F32_LAYER)


@pytest.mark.parametrize("kind", ["nnx", "linen"])
def test_modules_under_shard_map(kind: str) -> None:
    mesh = make_mesh(model=8)
    params = layer_cases.make_params(V3)
    x = jnp.asarray(layer_cases.make_x(V3, 2, 6))
    cache, slots = layer_cases.make_cache(V3, [10, 10]).advance(6)
    if kind == "nnx":
        with jax.set_mesh(mesh):
            sharded = put(params, mesh, MLAParams.specs(V3, "model"))
            module = layers_nnx.MLAttention(V3, heads_axis="model", params=sharded)
        definition, weights = nnx.split(module)
        specs = nnx.get_partition_spec(weights)

        def layer(weights, cache, x, slots):
            return nnx.merge(definition, weights).decode(x, cache, slots=slots)
    else:
        module = linen.MLAttention(V3, heads_axis="model")
        weights = {"params": {k: v for k, v in vars(params).items() if v is not None}}
        specs = {"params": {k: v for k, v in vars(MLAParams.specs(V3, "model")).items() if v}}

        def layer(weights, cache, x, slots):
            return module.apply(weights, x, cache, slots=slots, method="decode")

    cache_specs = jax.tree.map(lambda _: P(), cache)
    slots_specs = jax.tree.map(lambda _: P(), slots)
    parallel = jax.jit(
        jax.shard_map(
            layer,
            mesh=mesh,
            in_specs=(specs, cache_specs, P(), slots_specs),
            out_specs=(cache_specs, P()),
        )
    )
    _, got = parallel(weights, cache, x, slots)
    for i in range(2):
        expected, _ = layer_cases.naive_layer(V3, params, np.asarray(x[i]))
        tolerances.assert_close("y", got[i], expected, tolerances.F32_LAYER)


def test_heads_that_devices_cannot_share_evenly() -> None:
    mesh = make_mesh(model=8)
    config = dataclasses.replace(V3, num_heads=12)
    params = layer_cases.make_params(config)
    cache, slots = layer_cases.make_cache(config, [4]).advance(1)
    layer = jax.shard_map(
        lambda x: decode(config, params, x, cache, slots=slots, heads_axis="model")[1],
        mesh=mesh,
        in_specs=P(),
        out_specs=P(),
    )
    with pytest.raises(
        ValueError, match="heads_axis must split num_heads = 12 evenly, got 'model'"
    ):
        layer(jnp.ones((1, 1, 24)))
