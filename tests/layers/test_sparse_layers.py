"""Layers with an indexer: shared selections, shapes that make them dense, modules, devices, errors.

What they compute is held against transformers in test_sparse_parity.py.
"""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import layer_cases
import sparse_layers
import tolerances
from jax_flashmla import CacheFormat
from jax_flashmla.layers import IndexerConfig, MLAParams, Selection, decode, linen, prefill, select
from jax_flashmla.layers import nnx as layers_nnx
from jax_flashmla.reference.index_append import turn
from layer_cases import V3

pytestmark = pytest.mark.usefixtures("on_cpu")

INDEXER = IndexerConfig(num_heads=8, topk=8, rope_layout="half", head_dim=16)
FULL = dataclasses.replace(V3, indexer=INDEXER)
SHARED = V3
NEW = 20  # tokens


def make_call(rooms=(24, 24), layers: int = 1, config=FULL, **options):
    """params, x [b, NEW, n], and a cache that has advanced by NEW and NEW - 7 tokens, its slots."""
    params = layer_cases.make_params(config)
    x = jnp.asarray(layer_cases.make_x(config, len(rooms), NEW))
    cache = sparse_layers.make_cache(config, list(rooms), layers=layers, **options)
    num_new = np.array([NEW, NEW - 7, NEW][: len(rooms)], np.int32)
    return params, x, *cache.advance(NEW, num_new)


def test_shared_layers_attend_to_what_the_last_full_one_selected():
    """A scan over two groups of a full and a shared layer, then a step in the same way."""
    stack = lambda p: jax.tree.map(lambda a: jnp.stack([a, a[::-1]]), p)  # noqa: E731
    weights = stack(layer_cases.make_params(FULL)), stack(layer_cases.make_params(SHARED))
    config = dataclasses.replace(INDEXER, shared=(False, True, False, True))
    assert [config.index_layer(i) for i in range(5)] == [0, 1, 1, 2, 2]
    _, x, cache, slots = make_call(layers=4, index_layers=config.index_layer(4))

    def group(function, slots, carry, group_input):
        cache, x = carry
        i, (full, shared) = group_input
        cache, selection = select(FULL, full, x, cache, slots=slots, layer=i)
        given = {"slots": slots, "selection": selection}
        cache, y = function(FULL, full, x, cache, layer=2 * i, **given)
        x = x + y
        cache, z = function(SHARED, shared, x, cache, layer=2 * i + 1, **given)
        return (cache, x + z), selection

    def run(function, cache, x, slots):
        body = lambda carry, given: group(function, slots, carry, given)  # noqa: E731
        return jax.lax.scan(body, (cache, x), (jnp.arange(2), weights))

    (cache, y), selections = jax.jit(lambda *a: run(prefill, *a))(cache, x, slots)
    chosen = [sparse_layers.positions_of_slots(cache, s) for s in selections.slots]
    cache, slots = cache.advance(1)
    last = x[:, -1:] * 0.5
    (cache, z), selections = jax.jit(lambda *a: run(decode, *a))(cache, last, slots)
    step_chosen = [sparse_layers.positions_of_slots(cache, s) for s in selections.slots]
    assert not np.array_equal(chosen[0], chosen[1])

    for sequence, count in enumerate((NEW, NEW - 7)):
        expected = np.concatenate([x[sequence, :count], last[sequence]]).astype(np.float64)
        for i in range(2):
            selected = np.concatenate([chosen[i][sequence, :count], step_chosen[i][sequence]])
            assert (selected >= 0).sum(axis=1).tolist() == [min(t + 1, 8) for t in range(count + 1)]
            for config, stacked in zip((FULL, SHARED), weights, strict=True):
                params = jax.tree.map(lambda a, i=i: a[i], stacked)
                expected += sparse_layers.naive_layer(config, params, expected, selected)[0]
        got = np.concatenate([y[sequence, :count], z[sequence]])
        tolerances.assert_close("y", got, expected, tolerances.F32_LOGITS)


def test_shapes_that_hold_no_more_than_topk_are_dense():
    """Not selected, and yet their keys are there when the sequence has grown."""
    config = dataclasses.replace(FULL, indexer=dataclasses.replace(INDEXER, topk=NEW))
    params, x, cache, slots = make_call(config=config)

    @functools.partial(jax.jit, static_argnames="prefix")
    def run(x, cache, prefix):
        cache, selection = select(config, params, x, cache, slots=slots, prefix=prefix)
        given = {"slots": slots, "prefix": prefix, "selection": selection}
        return *prefill(config, params, x, cache, **given), selection

    short, y, selection = run(x, cache, prefix=False)
    assert selection == Selection(None, None)
    long, z, selection = run(x, cache, prefix=True)
    assert selection.slots.shape == (2, NEW, NEW)
    np.testing.assert_array_equal(short.index_blocks, long.index_blocks)
    # The selection of all tokens is attention to all of them.
    for i, count in enumerate((NEW, NEW - 7)):
        tolerances.assert_close("y", y[i, :count], z[i, :count], tolerances.F32_LAYER)
    wide = dataclasses.replace(FULL, indexer=dataclasses.replace(INDEXER, topk=128))
    assert select(wide, params, x, cache, slots=slots)[1].slots is None  # the table's width


def test_modules_compute_what_the_functions_do():
    params, x, cache, _ = make_call(rooms=(30, 30))
    module = layers_nnx.MLAttention(FULL, params=params)
    other = linen.MLAttention(FULL)
    variables = {"params": {name: a for name, a in vars(params).items() if a is not None}}
    x = x[:, :2]
    cache, slots = cache.advance(2)

    @jax.jit
    def functions(params, x, cache):
        cache, selection = select(FULL, params, x, cache, slots=slots)
        return selection, decode(FULL, params, x, cache, slots=slots, selection=selection)

    @nnx.jit
    def of_nnx(module, x, cache):
        cache, selection = module.select(x, cache, slots=slots)
        return selection, module.decode(x, cache, slots=slots, selection=selection)

    @jax.jit
    def of_linen(variables, x, cache):
        call = functools.partial(other.apply, variables, x)
        cache, selection = call(cache, slots=slots, method="select")
        return selection, call(cache, slots=slots, selection=selection, method="decode")

    expected = functions(params, x, cache)
    for got in (of_nnx(module, x, cache), of_linen(variables, x, cache)):
        jax.tree.map(np.testing.assert_array_equal, got, expected)
    half = layers_nnx.MLAttention(FULL, param_dtype=jnp.bfloat16, params=params)
    assert half.params.index_w_weights.dtype == jnp.float32
    assert half.params.index_w_q.dtype == jnp.bfloat16
    init = functools.partial(MLAParams.init, FULL, dtype=jnp.bfloat16)
    drawn = jax.eval_shape(init, jax.random.key(0))
    assert drawn == MLAParams.shapes(FULL, jnp.bfloat16)
    assert drawn.index_w_weights.dtype == jnp.float32


def test_heads_over_eight_devices():
    """Each selects for itself: one sum a layer, as without an indexer."""
    mesh = jax.make_mesh(
        (8,), ("model",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices("cpu")
    )
    params, x, cache, slots = make_call()
    specs, whole = MLAParams.specs(FULL, "model"), jax.tree.map(lambda _: P(), (cache, slots))
    assert specs.index_w_q == P(None, None, None)

    def layer(params, x, cache, slots, axis="model"):
        return decode(FULL, params, x, cache, slots=slots, heads_axis=axis)

    put = lambda tree, specs: jax.tree.map(  # noqa: E731
        lambda a, s: jax.device_put(a, NamedSharding(mesh, s)), tree, specs
    )
    arguments = put(params, specs), put(x, P()), *put((cache, slots), whole)
    parallel = jax.jit(
        jax.shard_map(layer, mesh=mesh, in_specs=(specs, P(), *whole), out_specs=(whole[0], P()))
    )
    names = re.findall(
        r" (all-[a-z]+|collective-[a-z]+)\(", parallel.lower(*arguments).compile().as_text()
    )
    assert names == ["all-reduce"]
    got, y = parallel(*arguments)
    alone = jax.jit(lambda *a: layer(*a, axis=None))
    expected, z = alone(params, x, cache, slots)
    np.testing.assert_allclose(got.index_blocks, expected.index_blocks, rtol=1e-5, atol=1e-6)
    for i, count in enumerate((NEW, NEW - 7)):
        tolerances.assert_close("y", y[i, :count], z[i, :count], tolerances.F32_LAYER)


def test_fp8_keys_of_a_step_with_padding():
    """Written and selected from as those of the sequence alone; on a GPU by index_append."""
    config = dataclasses.replace(FULL, indexer=dataclasses.replace(INDEXER, head_dim=128))
    params, x, cache, slots = make_call(config=config, fp8_keys=True)
    step = jax.jit(lambda x, cache, slots: select(config, params, x, cache, slots=slots))
    written, selection = step(x, cache, slots)
    got = sparse_layers.positions_of_slots(written, selection.slots)[1, : NEW - 7]

    alone = sparse_layers.make_cache(config, [24], fp8_keys=True)
    alone, selection = step(x[1:, : NEW - 7], *alone.advance(NEW - 7))
    want = sparse_layers.positions_of_slots(alone, selection.slots)[0]
    np.testing.assert_array_equal(got, want)
    text = step.trace(x, cache, slots).lower(lowering_platforms=("cuda",)).as_text()
    assert "@flashmla_index_append_v1(" in text
    assert "@flashmla_cache_append_v1(" not in text


def test_a_given_selection_needs_none_of_the_indexer_s_weights():
    params, x, cache, slots = make_call()
    cache, selection = select(FULL, params, x, cache, slots=slots)
    step = lambda params, **given: decode(FULL, params, x, cache, slots=slots, **given)[1]  # noqa: E731
    index = {k: v * np.nan for k, v in vars(params).items() if k.startswith("index_")}
    poisoned = dataclasses.replace(params, **index)
    given = jax.jit(functools.partial(step, selection=selection))
    np.testing.assert_array_equal(given(poisoned), given(params))
    weight = "f32[" + ",".join(map(str, (1, *params.index_w_weights.shape))) + "]"
    assert weight not in str(jax.make_jaxpr(given)(params))
    assert weight in str(jax.make_jaxpr(step)(params))


def test_hadamard_rotation():
    x = np.random.default_rng(0).standard_normal((3, 16)).astype(np.float32)
    matrix = np.array([[(-1) ** bin(i & j).count("1") for j in range(16)] for i in range(16)])
    spread = turn(jnp.asarray(x), None, None, "none", hadamard=True)
    np.testing.assert_allclose(spread, x @ matrix / 4, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"num_heads": 65}, ValueError, r"indexer.num_heads must be .* 64.*got 65"),
        ({"topk": 0}, ValueError, r"indexer.topk must be .*got 0"),
        ({"topk": 4097}, ValueError, r"indexer.topk must be .*4096.*got 4097"),
        ({"rope_layout": "none"}, ValueError, "indexer.rope_layout must be one of"),
        ({"head_dim": 24}, ValueError, "head_dim must be a power of two with hadamard, got 24"),
        ({"hadamard": 1}, TypeError, "indexer.hadamard must be a bool"),
        ({"shared": (True,)}, ValueError, "indexer.shared must begin with False"),
        ({"shared": "FS"}, TypeError, "indexer.shared must be a tuple of bools"),
        ({"norm_eps": 0}, ValueError, "indexer.norm_eps must be positive"),
    ],
)
def test_bad_indexers(change, error, message):
    with pytest.raises(error, match=message):
        dataclasses.replace(INDEXER, **change)


def test_bad_configs():
    with pytest.raises(ValueError, match="q_lora_rank must be an int with an indexer"):
        dataclasses.replace(FULL, q_lora_rank=None)
    with pytest.raises(TypeError, match="indexer must be an IndexerConfig or None, got 3"):
        dataclasses.replace(V3, indexer=3)
    with pytest.raises(ValueError, match="head_dim must be at least qk_rope_head_dim = 8, got 4"):
        dataclasses.replace(V3, indexer=dataclasses.replace(INDEXER, head_dim=4))
    with pytest.raises(NotImplementedError, match='name must be "dense" or "v32", got \'v4\''):
        FULL.cache_format(name="v4")
    with pytest.raises(ValueError, match='d_qk must be 576 in format "v32", got 24'):
        FULL.cache_format(name="v32")
    assert V3.index_format() is None
    assert FULL.index_format() == CacheFormat(d_qk=16, d_v=16)


def test_bad_calls():
    params, x, cache, slots = make_call(layers=2, index_layers=1)
    bare = layer_cases.make_params(V3)
    with pytest.raises(ValueError, match="config must have an indexer"):
        select(V3, bare, x, cache, slots=slots)
    for function in (decode, prefill):
        with pytest.raises(ValueError, match="selection must be given where the cache has an"):
            function(V3, bare, x, cache, slots=slots, layer=0)
        with pytest.raises(ValueError, match="cache's 2 layers but 1, got None"):
            function(FULL, params, x, cache, slots=slots, layer=0)
        with pytest.raises(TypeError, match="selection must be a Selection or None, got"):
            function(FULL, params, x, cache, slots=slots, layer=0, selection=jnp.zeros(3))
    with pytest.raises(ValueError, match=r"params.index_w_q must be \(10, 8, 16\), got None"):
        select(FULL, bare, x, cache, slots=slots)
    other = dataclasses.replace(FULL, indexer=dataclasses.replace(INDEXER, head_dim=32))
    with pytest.raises(ValueError, match=r"index pool .* indexer.head_dim = 32 columns"):
        select(other, layer_cases.make_params(other), x, cache, slots=slots)
    for name in ("slots", "lengths"):
        lists = dataclasses.replace(Selection(None, None), **{name: [[0]]})
        with pytest.raises(TypeError, match=rf"selection.{name} must be an array \[b"):
            decode(FULL, params, x, cache, slots=slots, layer=0, selection=lists)
    short = Selection(jnp.zeros((2, 3, 8), jnp.int32), jnp.zeros((2, 3), jnp.int32))
    with pytest.raises(ValueError, match="selection must be of x's"):
        decode(FULL, params, x, cache, slots=slots, layer=0, selection=short)
    of_x = jnp.zeros((*x.shape[:2], 8), jnp.int32)
    for other, message in (
        (Selection(of_x[..., 0], of_x[..., 0]), r"slots \[b, s, topk\], got slots of shape \(2, "),
        (Selection(of_x, of_x[:, 0, 0]), r"lengths \[b, s\], got lengths of shape \(2,\)"),
    ):
        for function in (decode, prefill):
            with pytest.raises(ValueError, match="selection must be of x's b, s = .*" + message):
                function(FULL, params, x, cache, slots=slots, layer=0, selection=other)
    for layer, error in ((-1, ValueError), (1.5, TypeError), ("a", TypeError)):
        for call in (INDEXER.index_layer, INDEXER.is_shared, FULL.for_layer):
            with pytest.raises(error, match="layer must be"):
                call(layer)
    for call in (MLAParams.shapes, functools.partial(MLAParams.specs, heads=None)):
        with pytest.raises(TypeError, match="config must be an MLAConfig, got NoneType"):
            call(None)
