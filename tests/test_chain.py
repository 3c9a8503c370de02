"""Chains: the results of their operations one by one, from one custom call where that may be."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from ffi_calls import refused, result, zeros
from jax_flashmla import (
    BlockTable,
    CacheFormat,
    PagedCache,
    dense_decode,
    latent_append,
    project,
)
from jax_flashmla._xla.chain import chain
from jax_flashmla._xla.chain_call import Call, Operand, make_plan
from jax_flashmla.bench.pools import random_blocks
from jax_flashmla.layers import IndexerConfig, MLAConfig, MLAParams, RopeConfig, decode

B, HEADS, RANK, ROPE, HIDDEN = 2, 4, 16, 8, 24
FORMAT = CacheFormat(d_qk=RANK + ROPE, d_v=RANK, dtype=jnp.float32, block_size=8)


def arguments(seed: int = 0, lengths: tuple[int, int] = (5, 9)) -> list[Any]:
    """x, three weights, a norm's, and a cache of two sequences with random rows."""
    keys = jax.random.split(jax.random.key(seed), 6)
    shapes = [(B, 1, HIDDEN), (1, HIDDEN, RANK + ROPE), (1, HIDDEN, HEADS * (RANK + ROPE))]
    shapes += [(1, HEADS * RANK, HIDDEN), (RANK,)]
    ids = np.arange(8, dtype=np.int32).reshape(B, 4)
    table = BlockTable.create(ids, np.array(lengths, np.int32), block_size=8)
    cache = PagedCache.create(FORMAT, table, num_blocks=8, layers=1)
    cache = dataclasses.replace(cache, blocks=jax.random.normal(keys[5], cache.blocks.shape))
    arrays = [jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=False)]
    return [*arrays, cache]


def attend(
    x, w, w_q, w_o, norm, cache, *, implementation="kernel", between=lambda x: x, old=False
) -> tuple[PagedCache, jax.Array, jax.Array]:
    """Five operations with reshapes between them, and sums before and behind them."""
    products = functools.partial(project, implementation=implementation)
    cache, slots = cache.advance()
    down = products(x, w).reshape(B, 1, -1)
    view = cache.layer(0)
    blocks, _ = latent_append(
        view.blocks, between(down), norm * 2, None, None, view.block_table, slots.positions,
        layout="none", format=view.format, implementation=implementation,
    )  # fmt: skip
    q = products(x, w_q).reshape(B, 1, HEADS, -1)
    out, lse = dense_decode(
        q, view.blocks if old else blocks, view.block_table, cache.table.cache_seqlens, d_v=RANK,
        implementation=implementation,
    )  # fmt: skip
    y = products(out.reshape(B, 1, -1), w_o)
    return dataclasses.replace(cache, blocks=blocks), y + x, lse.sum()


def custom_calls(function: Callable, *args: Any, platform: str = "cpu") -> dict[str, int]:
    """How often each target is called."""
    lowered = jax.jit(function).trace(*args).lower(lowering_platforms=(platform,)).as_text()
    found = [
        line.split("@flashmla_")[1].split("(")[0]
        for line in lowered.splitlines()
        if "@flashmla_" in line
    ]
    return {target: found.count(target) for target in found}


def same(got: Any, expected: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("donated", [False, True])
def test_a_chain_is_one_call_with_its_calls_results(donated: bool) -> None:
    chained = functools.partial(chain, attend)
    assert custom_calls(chained, *arguments()) == {"chain_v1": 1, "make_schedule_v1": 1}
    run = jax.jit(chained, donate_argnums=5 if donated else ())
    for seed, lengths in enumerate([(5, 9), (0, 31), (17, 2)]):
        expected = jax.jit(attend)(*arguments(seed, lengths))
        same(run(*arguments(seed, lengths)), expected)


@pytest.mark.usefixtures("on_cpu")
def test_what_is_computed_between_two_operations_ends_a_chain() -> None:
    function = functools.partial(attend, between=jnp.tanh)
    chained = functools.partial(chain, function)
    assert custom_calls(chained, *arguments()) == {
        "chain_v1": 1,  # both projections of x
        "latent_append_v1": 1,
        "dense_decode_v1": 1,
        "project_v1": 1,
        "make_schedule_v1": 1,
    }
    same(jax.jit(chained)(*arguments()), jax.jit(function)(*arguments()))


@pytest.mark.usefixtures("on_cpu")
def test_rows_that_one_call_overwrites_and_another_needs_are_both_right() -> None:
    function = functools.partial(attend, old=True)
    chained = functools.partial(chain, function)
    assert "chain_v1" not in custom_calls(chained, *arguments())
    same(jax.jit(chained)(*arguments()), jax.jit(function)(*arguments()))


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("function", [lambda x: x * 2, lambda x: project(x, x[None, 0])[0]])
def test_what_has_no_two_operations_is_no_chain(function: Callable) -> None:
    x = jax.random.normal(jax.random.key(0), (3, 1, 1))
    assert "chain_v1" not in custom_calls(functools.partial(chain, function), x)
    same(chain(function, x), function(x))


@pytest.mark.usefixtures("on_cpu")
def test_what_is_known_stays_known_within_a_chain() -> None:
    def function(x, number, text, none, rows):
        assert (int(number), text, none) == (2, "a", None)
        return x * int(number) + rows[int(number)]

    def call(x, number):
        return chain(function, x, number, "a", None, np.arange(3.0))

    for number in (2, np.int64(2), np.array(2), jnp.int32(2)):
        assert call(jnp.float32(3), number) == 8
        assert jax.jit(functools.partial(call, number=number))(jnp.float32(3)) == 8
    with pytest.raises(jax.errors.ConcretizationTypeError):
        jax.jit(call)(jnp.float32(3), 2)


@pytest.mark.usefixtures("on_cpu")
def test_transformations_of_a_chain_are_those_of_its_calls() -> None:
    args = arguments()
    chained = functools.partial(chain, attend)
    xs = jnp.stack([args[0], 2 * args[0], -args[0]])
    each = [jax.jit(attend)(x, *args[1:]) for x in xs]
    mapped = jax.jit(jax.vmap(chained, in_axes=(0, *[None] * 5)))(xs, *args[1:])
    np.testing.assert_allclose(mapped[1], jnp.stack([y for _, y, _ in each]), rtol=1e-5, atol=1e-5)
    with pytest.raises(NotImplementedError, match="project cannot be differentiated"):
        jax.grad(lambda x: chained(x, *args[1:])[1].sum())(args[0])
    plain = functools.partial(attend, implementation="xla")
    gradient, expected = (
        jax.grad(lambda x, f=f: f(x, *args[1:])[1].sum())(args[0])
        for f in (functools.partial(chain, plain), plain)
    )
    np.testing.assert_allclose(gradient, expected, rtol=1e-5)
    with jax.disable_jit():
        same(chained(*args)[1:], attend(*args)[1:])


def layer(indexer: IndexerConfig | None) -> MLAConfig:
    return MLAConfig(
        hidden_size=256, num_heads=16, q_lora_rank=128, kv_lora_rank=512, qk_nope_head_dim=128,
        qk_rope_head_dim=64, v_head_dim=128, rope=RopeConfig(layout="deinterleaved"),
        indexer=indexer,
    )  # fmt: skip


def sparse_or_dense(sparse: bool) -> MLAConfig:
    return layer(IndexerConfig(num_heads=64, topk=256, rope_layout="half") if sparse else None)


def two_layers(config: MLAConfig, b: int) -> PagedCache:
    """A cache of random rows, of sequences of up to 2,000 tokens."""
    rng = np.random.default_rng(b)
    ids = rng.permutation(b * 32).reshape(b, 32).astype(np.int32)
    lengths = rng.integers(0, 2000, b).astype(np.int32)
    cache = PagedCache.create(
        config.cache_format(name="v32" if config.indexer else "dense"),
        BlockTable.create(ids, lengths, block_size=64),
        num_blocks=b * 32,
        layers=2,
        index_format=config.index_format(),
    )
    formats = {"blocks": cache.format, "index_blocks": cache.index_format}
    made = {k: random_blocks(format, 2 * b * 32) for k, format in formats.items() if format}
    return dataclasses.replace(cache, **made)


def step(
    config: MLAConfig, params: MLAParams, x: jax.Array, cache: PagedCache, **options: str
) -> tuple[PagedCache, jax.Array]:
    cache, slots = cache.advance()
    for i in range(2):
        cache, y = decode(config, params, x, cache, slots=slots, layer=i, **options)
        x = x + y
    return cache, x


@pytest.mark.gpu
@pytest.mark.parametrize("b", [1, 6, 40])
@pytest.mark.parametrize("sparse", [False, True])
def test_kernels_that_start_early_give_the_same_bits(sparse: bool, b: int, monkeypatch) -> None:
    config = sparse_or_dense(sparse)
    with jax.default_device(jax.devices("cuda")[0]):
        params = MLAParams.init(config, jax.random.key(0), jnp.bfloat16)
        x = jax.random.normal(jax.random.key(1), (b, 1, 256), jnp.bfloat16)
        results = []
        for function in (chain, lambda run, *args: run(*args)):
            monkeypatch.setattr(sys.modules[decode.__module__], "chain", function)
            run = jax.jit(lambda *args: step(config, *args), donate_argnums=2)
            cache, y, each = two_layers(config, b), x, []
            for _ in range(20):
                cache, y = run(params, y, cache)
                y = y / jnp.abs(y).max()
                each.append(np.asarray(y, np.float32))
            results.append((each, np.asarray(cache.blocks).view(np.uint8)))
        same(*results)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("sparse", [False, True])
def test_a_decoding_layer_is_one_call_on_a_gpu(sparse: bool) -> None:
    config = sparse_or_dense(sparse)
    cache = jax.eval_shape(lambda: two_layers(config, B))
    params = MLAParams.shapes(config, jnp.bfloat16)
    x = jax.ShapeDtypeStruct((B, 1, 256), jnp.bfloat16)
    calls = custom_calls(functools.partial(step, config), params, x, cache, platform="cuda")
    assert calls.pop("make_schedule_v1") <= 4
    assert calls == {"chain_v1": 2}


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("sparse", [False, True])
def test_a_layer_whose_heads_are_split_is_one_call_on_a_gpu(sparse: bool) -> None:
    """And all devices are known to have the same cache, index keys among it, and the same y."""
    config = sparse_or_dense(sparse)
    mesh = Mesh(np.array(jax.devices("cpu")[:2]), ("model",))
    cache = two_layers(config, B)
    specs = MLAParams.specs(config, "model"), P(), cache.specs()
    split = jax.shard_map(
        functools.partial(step, config, heads_axis="model"),
        mesh=mesh,
        in_specs=specs,
        out_specs=(cache.specs(), P()),
    )
    arguments = MLAParams.shapes(config, jnp.bfloat16), jnp.ones((B, 1, 256), jnp.bfloat16), cache
    assert custom_calls(split, *arguments, platform="cuda")["chain_v1"] == 2


@pytest.mark.usefixtures("on_cpu")
def test_results_of_a_chain_take_turns_in_its_workspace() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        types = [
            [jax.ShapeDtypeStruct((int(rng.integers(1, 2000)),), np.float32)] * int(n)
            for n in rng.integers(1, 4, 6)
        ]
        numbers = np.cumsum([0, *map(len, types)])
        calls = [
            Call(None, tuple(Operand(True, int(k), ()) for k in rng.integers(0, before, 2)), ())
            if before
            else Call(None, (), ())
            for before in numbers[:-1]
        ]
        kept = sorted({int(k) for k in rng.integers(0, numbers[-1], 2)})
        plan = make_plan(calls, types, kept)
        lives = {}
        for i, call in enumerate(calls):
            for k in range(numbers[i], numbers[i + 1]):
                lives[k] = [i, i]
            for operand in call.operands:
                lives[operand.index][1] = i
        flat = [aval for each in types for aval in each]
        places = [place for each in plan.places for place in each]
        for k, place in enumerate(places):
            if k in kept:
                assert place == kept.index(k)
                continue
            begin, end = -1 - place, -1 - place + flat[k].size * 4
            assert begin % 256 == 0
            assert 0 <= begin < end <= plan.workspace_bytes
            for j, other in enumerate(places[:k]):
                if j in kept or lives[j][1] < lives[k][0]:
                    continue
                assert -1 - other + flat[j].size * 4 <= begin or -1 - other >= end


# One product [3, 2, 8] of x [3, 2, 4]: of each operand index, rank, dimensions; of each result
# place, type, rank, dimensions.
OPERANDS = [
    (0, 3, 3, 2, 4),
    (1, 3, 2, 4, 8),
    (2, 3, 2, 4, 0),
    (2, 3, 2, 4, 0),
    (3, 3, 2, 4, 0),
    (4, 2, 3, 0),
    (4, 2, 3, 0),
]
RESULTS = [(0, 16, 3, 3, 2, 8), (-1, 11, 3, 3, 2, 0)]


def words_of(operands: list[tuple[int, ...]], results: list[tuple[int, ...]]) -> np.ndarray:
    parts = [(len(operands),), *operands, (len(results),), *results]
    return np.concatenate(parts).astype(np.int64)


def chain_of_project(**wrong: Any) -> list[jax.Array]:
    operands = [zeros(3, 2, 4), zeros(2, 4, 8), zeros(2, 4, 0)]
    operands += [zeros(2, 4, 0, dtype=jnp.float32), zeros(3, 0, dtype=jnp.float32)]
    attributes = {
        "targets": "flashmla_project_v1 ",
        "words": words_of(OPERANDS, RESULTS),
        "0.layout": np.int32(3),
        "0.transposed": False,
    } | wrong
    results = [result(3, 2, 8, dtype=jnp.bfloat16), result(0, dtype=jnp.uint8)]
    call = jax.ffi.ffi_call("flashmla_chain_v1", results)
    return jax.block_until_ready(call(*map(jnp.asarray, operands), **attributes))


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(
    ("match", "wrong"),
    [
        ("targets must be known", {"targets": "flashmla_projects_v1 "}),
        ("targets must each end in a space", {"targets": "flashmla_project_v1"}),
        ("words must be of the targets' calls", {"targets": ""}),
        ("words must be int64", {"words": words_of(OPERANDS, RESULTS).astype(np.int32)}),
        ("words must name operands", {"words": words_of([(5, 0)], RESULTS)}),
        ("words must name operands", {"words": words_of([(-1, 0)], RESULTS)}),
        ("words must name operands", {"words": words_of([(0, 3, 3, 2, 5)], RESULTS)}),
        ("words must name operands", {"words": np.array([1, 0, 9, 3, 2, 4], np.int64)}),
        ("words must name operands", {"words": words_of([(0, 3, -3, -2, 4)], RESULTS)}),
        ("words must name operands", {"words": words_of([(2, 3, 2**62, 4, 0)], RESULTS)}),
        ("words must name operands", {"words": np.array([9], np.int64)}),
        ("words must place results", {"words": words_of(OPERANDS, [(1, 16, 3, 3, 2, 8)])}),
        ("words must place results", {"words": words_of(OPERANDS, [(0, 16, 3, 3, 2, 9)])}),
        ("words must place results", {"words": words_of(OPERANDS, [(0, 11, 3, 3, 2, 8)])}),
        ("words must place results", {"words": words_of(OPERANDS, [(-1, 11, 3, 3, 2, 1)])}),
        ("words must place results", {"words": words_of(OPERANDS, [(-9, 11, 3, 3, 2, 0)])}),
        (
            "w0 must have dtype|w",
            {"words": words_of([OPERANDS[0], (3, *OPERANDS[2][1:]), *OPERANDS[2:]], RESULTS)},
        ),
    ],
)
def test_the_handler_refuses_words_that_lead_out_of_its_buffers(match: str, wrong: dict) -> None:
    assert chain_of_project()[0].shape == (3, 2, 8)
    refused(chain_of_project, match, **wrong)
