"""prefill and decode against attention done naively in float64, and against each other."""

from __future__ import annotations

import dataclasses
import doctest
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import layer_cases
import tolerances
from jax_flashmla import PagedCache, make_schedule
from jax_flashmla.layers import MLAConfig, MLAParams, absorb, decode, prefill
from layer_cases import COMPILED, CONFIGS, LITE, V3, Run

pytestmark = pytest.mark.usefixtures("on_cpu")

LENGTHS = [13, 6, 21]  # tokens, the step's included; 21 is in three blocks


every_kind = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
with_and_without_query_rank = pytest.mark.parametrize("config", [V3, LITE], ids=["v3", "v2-lite"])


@with_and_without_query_rank
@pytest.mark.parametrize("prefix", [False, True])
def test_prefill_of_whole_prompts(config: MLAConfig, prefix: bool) -> None:
    run = Run(config, LENGTHS)
    run.step(prefill, LENGTHS, 24, prefix=prefix)
    run.check()


@with_and_without_query_rank
def test_decode_from_the_first_token_on(config: MLAConfig) -> None:
    run = Run(config, [5, 3])
    run.step(decode, [1, 1])
    run.step(decode, [1, 0])  # the second one waits
    run.step(decode, [1, 1])
    run.step(decode, [1, 1])
    run.step(decode, [1, 0])
    run.check()


@every_kind
def test_prefill_then_decode(config: MLAConfig) -> None:
    run = Run(config, LENGTHS)
    run.step(prefill, [n - 4 for n in LENGTHS], prefix=False)
    for _ in range(4):
        run.step(decode, [1, 1, 1])
    run.check()


@with_and_without_query_rank
def test_prefill_in_chunks(config: MLAConfig) -> None:
    run = Run(config, LENGTHS)
    run.step(prefill, [5, 6, 8])
    run.step(prefill, [8, 0, 8])
    run.step(prefill, [0, 0, 5], 8)
    run.check()


@pytest.mark.parametrize(
    ("config", "implementation"),
    [(V3, "kernel"), (V3, "xla"), (LITE, "kernel")],
    ids=["v3-kernel", "v3-xla", "v2-lite"],
)
def test_several_tokens_a_step_with_unequal_counts(config: MLAConfig, implementation: str) -> None:
    run = Run(config, LENGTHS, implementation=implementation)
    run.step(prefill, [7, 1, 14], prefix=False)
    run.step(decode, [3, 2, 0], 4)
    run.step(decode, [3, 3, 4])
    run.step(decode, [0, 0, 3], 3)
    run.check()


@pytest.mark.parametrize("name", ["longcat", "no rope"])
def test_absorbed_weights_give_the_same(name: str) -> None:
    config = CONFIGS[name]
    run = Run(config, LENGTHS)
    absorbed = absorb(config, run.params)
    run.step(prefill, [n - 3 for n in LENGTHS], prefix=False)
    run.step(decode, [1, 1, 1], absorbed=absorbed)
    run.step(decode, [2, 2, 2], absorbed=absorbed)
    run.check()


def test_bfloat16() -> None:
    run = Run(V3, LENGTHS, dtype="bfloat16", tolerance=tolerances.BF16_LAYER)
    run.step(prefill, [4, 2, 10], prefix=False)
    run.step(prefill, [5, 0, 7])
    run.step(decode, [2, 2, 2])
    run.step(decode, [2, 2, 2], absorbed=absorb(V3, run.params))
    run.check()


def test_parameters_cache_and_computation_of_different_types() -> None:
    """bfloat16 parameters and cache under float32 activations: only what is stored is rounded."""
    params = layer_cases.make_params(V3, "bfloat16")
    x = layer_cases.make_x(V3, 1, 20)
    cache, slots = layer_cases.make_cache(V3, [20], dtype="bfloat16").advance(20)
    expected, rows = layer_cases.naive_layer(V3, params, x[0])
    for function in (prefill, decode):
        written, y = COMPILED[function](V3, params, jnp.asarray(x), cache, slots=slots)
        assert y.dtype == jnp.float32
        assert written.blocks.dtype == jnp.bfloat16
        tolerances.assert_close("y", y[0], expected, tolerances.BF16_LAYER)
        cached = layer_cases.cached_rows(written, 0)
        np.testing.assert_array_equal(
            cached, np.asarray(jnp.asarray(rows, jnp.bfloat16), np.float64)
        )


def test_a_sequence_without_room_drops_its_tokens_and_counts_them() -> None:
    run = Run(V3, [16, 12])
    run.cache = layer_cases.make_cache(V3, [16, 8])
    run.step(prefill, [14, 8], prefix=False)
    run.step(decode, [2, 2])
    np.testing.assert_array_equal(run.cache.overflow, [0, 2])
    np.testing.assert_array_equal(run.cache.table.cache_seqlens, [16, 8])
    for i, length in enumerate([16, 8]):
        y, rows = layer_cases.naive_layer(V3, run.params, run.x[i, :length])
        tolerances.assert_close("y", run.y[i, :length], y, tolerances.F32_LAYER)
        cached = layer_cases.cached_rows(run.cache, i)
        tolerances.assert_close("rows", cached, rows, tolerances.F32_LAYER)


@with_and_without_query_rank
@pytest.mark.parametrize("array_per_layer", [False, True])
def test_layers_of_one_cache(config: MLAConfig, array_per_layer: bool) -> None:
    """Layers chained in one jitted, donating step; a scan where they share an array."""
    params = layer_cases.make_params(config)
    weights = jax.tree.map(lambda a: jnp.stack([a, 0.5 * a, -a]), params)
    x = layer_cases.make_x(config, 2, 12)
    cache = layer_cases.make_cache(config, [12, 12], layers=3, array_per_layer=array_per_layer)

    def layers_of(function, cache: PagedCache, x: jax.Array) -> tuple[PagedCache, jax.Array]:
        cache, slots = cache.advance(x.shape[1])
        options: dict = {"slots": slots}
        if function is decode:
            options["schedule"] = make_schedule(
                cache.table.cache_seqlens, h_q=config.num_heads, s_q=x.shape[1]
            )

        def layer(carry, inputs: tuple[jax.Array | int, MLAParams]):
            cache, x = carry
            i, params = inputs
            cache, y = function(config, params, x, cache, layer=i, **options)
            return (cache, x + y), None

        carry = (cache, x)
        if not array_per_layer:
            return jax.lax.scan(layer, carry, (jnp.arange(3), weights))[0]
        for i in (0, np.int64(1), np.array(2)):  # all known while tracing
            carry, _ = layer(carry, (i, jax.tree.map(lambda a, i=i: a[i], weights)))
        return carry

    step = jax.jit(layers_of, static_argnums=0, donate_argnums=1)
    cache, first = step(prefill, cache, jnp.asarray(x[:, :9]))
    got = [np.asarray(first)]
    for t in range(9, 12):
        cache, y = step(decode, cache, jnp.asarray(x[:, t : t + 1]))
        got.append(np.asarray(y))
    for i in range(2):
        expected = x[i].astype(np.float64)
        for n in range(3):
            one = jax.tree.map(lambda a, n=n: np.asarray(a, np.float64)[n], weights)
            expected = expected + layer_cases.naive_layer(config, one, expected)[0]
        tolerances.assert_close("x", np.concatenate(got, axis=1)[i], expected, tolerances.F32_LAYER)


def test_writing_is_in_place() -> None:
    """A donated cache is neither copied nor gathered by a scan over layers."""
    config = dataclasses.replace(V3, num_heads=2)
    weights = jax.tree.map(lambda a: jnp.stack([a, a]), layer_cases.make_params(config))
    cache = layer_cases.make_cache(config, [30], layers=2)

    def step(cache: PagedCache, x: jax.Array) -> tuple[PagedCache, jax.Array]:
        cache, slots = cache.advance(x.shape[1])

        def layer(carry, inputs):
            cache, x = carry
            return decode(config, inputs[1], x, cache, slots=slots, layer=inputs[0]), None

        return jax.lax.scan(layer, (cache, x), (jnp.arange(2), weights))[0]

    x = jnp.ones((1, 1, config.hidden_size))
    text = jax.jit(step, donate_argnums=0).lower(cache, x).compile().as_text()
    whole = ",".join(map(str, cache.blocks.shape))
    assert f"f32[{whole}]" in text
    copies = [line for line in text.splitlines() if f"f32[{whole}]" in line and " copy(" in line]
    assert copies == []


def test_init_has_unit_variance_and_norms_of_ones() -> None:
    config = dataclasses.replace(V3, hidden_size=300, num_heads=40)
    params = jax.jit(MLAParams.init, static_argnums=2)(config, jax.random.key(0), jnp.bfloat16)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(
        lambda s: s.shape, MLAParams.shapes(config)
    )
    assert {a.dtype for a in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    assert bool((params.kv_norm == 1).all() and (params.q_norm == 1).all())
    assert np.std(np.asarray(params.w_dkv, np.float32)) == pytest.approx(300**-0.5, rel=0.03)
    assert np.std(np.asarray(params.w_o, np.float32)) == pytest.approx(200**-0.5, rel=0.03)
    assert np.std(np.asarray(params.w_uk, np.float32)) == pytest.approx(16**-0.5, rel=0.03)
    assert params.w_q is None


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=lambda t: t.name)
@pytest.mark.parametrize("name", ["mla_layers.md", "paged_cache.md", "sparse_attention.md"])
def test_documentation_runs(
    monkeypatch: pytest.MonkeyPatch, name: str, axis_type: AxisType
) -> None:
    """Also with meshes as jax.make_mesh makes them from jax 0.12 on."""
    make_mesh = jax.make_mesh

    def with_type(shape: tuple, names: tuple, **options: Any) -> jax.sharding.Mesh:
        return make_mesh(shape, names, axis_types=(axis_type,) * len(names), **options)

    monkeypatch.setattr(jax, "make_mesh", with_type)
    page = pathlib.Path(__file__).parents[2] / "docs" / name
    result = doctest.testfile(str(page), module_relative=False)
    assert result.attempted > 20
    assert result.failed == 0
