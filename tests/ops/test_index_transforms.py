"""The indexer under JAX's transformations, over devices, and made here to run elsewhere."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import index_cases
import tolerances
from index_cases import FORMAT, IndexCase
from jax_flashmla import export_checks, index_scores, index_topk, make_schedule

pytestmark = pytest.mark.usefixtures("on_cpu")

# Of few small integers: scores are exact, so that programs agree in bits.
CASE = IndexCase(b=2, s_q=2, heads=3, s_k=150, layers=3, integers=True)
TOPK = 20


@functools.cache
def arrays() -> dict[str, jax.Array]:
    arguments = index_cases.make_problem(CASE).arguments
    names = ("q", "weights", "blocks", "block_table", "cache_seqlens", "first_block")
    found = {name: jnp.asarray(arguments[name]) for name in names}
    return found | {"first_block": jnp.int32(arguments["first_block"])}


def score(given: dict, **options: Any) -> jax.Array:
    return index_scores(**given, format=FORMAT, layer_blocks=CASE.layer_blocks, **options)


def topk(given: dict, **options: Any) -> tuple[jax.Array, jax.Array]:
    options = {"layer_blocks": CASE.layer_blocks, "return_positions": True, **options}
    return index_topk(**given, format=FORMAT, topk=TOPK, **options)


def both(given: dict, **options: Any) -> tuple[jax.Array, ...]:
    return score(given, **options), *topk(given, **options)


def select(given: dict, **options: Any) -> tuple[jax.Array, jax.Array]:
    """Of given scores."""
    return topk({"q": None, "weights": None, "blocks": None, **given}, **options)


reference = jax.jit(functools.partial(both, implementation="xla"))


def equal(got: tuple, expected: tuple) -> None:
    for x, y in zip(got, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def test_jit_eager_64_bits_and_disabled_jit_agree() -> None:
    expected = reference(arrays())
    eager = both(arrays())
    equal(eager, expected)
    equal(jax.jit(both)(arrays()), expected)
    with jax.disable_jit():
        equal(both(arrays()), expected)
    with jax.enable_x64(True):
        got = both(arrays())
        assert [x.dtype for x in got] == [jnp.float32, jnp.int32, jnp.int32]
        equal(got, expected)
        wide = {k: v.astype(np.int64) if v.dtype == np.int32 else v for k, v in arrays().items()}
        for implementation in ("kernel", "xla"):
            equal(jax.jit(functools.partial(both, implementation=implementation))(wide), expected)


def test_abstract_shapes() -> None:
    shapes = {k: jax.ShapeDtypeStruct(x.shape, x.dtype) for k, x in arrays().items()}
    scores, indices, positions = jax.eval_shape(both, shapes)
    assert (scores.shape, scores.dtype) == ((2, 2, 4 * 64), jnp.float32)
    for x in (indices, positions):
        assert (x.shape, x.dtype) == ((2, 2, TOPK), jnp.int32)


# vmap.


def stacked(n: int = 3) -> dict[str, np.ndarray]:
    """n problems, whose caches hold no poison: any block of a layer may be in the table."""
    rng = np.random.default_rng(1)
    num_blocks = len(arrays()["blocks"])

    def another() -> dict[str, np.ndarray]:
        q, weights, *_ = index_cases.make_numbers(rng, CASE, 1)
        codes, scales = index_cases.make_numbers(rng, IndexCase(b=num_blocks, integers=True), 64)[
            2:
        ]
        planes = [x.view(np.uint8).reshape(num_blocks, -1) for x in (codes, scales)]
        return {
            "q": q,
            "weights": weights,
            "blocks": np.concatenate(planes, axis=1),
            "block_table": rng.integers(-2, CASE.layer_blocks + 2, (2, 4)).astype(np.int32),
            "cache_seqlens": rng.integers(-1, 260, 2).astype(np.int32),
            "first_block": np.int32(rng.integers(-1, num_blocks + 1)),  # clamped to the array
        }

    problems = [another() for _ in range(n)]
    return {k: np.stack([problem[k] for problem in problems]) for k in problems[0]}


@pytest.mark.parametrize(
    ("mapped", "axis"),
    [
        (None, 0),
        (("q", "weights"), -1),
        (("blocks",), 1),
        (("first_block",), 0),
        (("block_table", "cache_seqlens"), -1),
        (("blocks", "block_table"), 0),
    ],
    ids=str,
)
def test_vmap(mapped: tuple[str, ...] | None, axis: int) -> None:
    given = stacked()
    mapped = tuple(given) if mapped is None else mapped
    moved = {k: np.moveaxis(x, 0, axis) if k in mapped else x[0] for k, x in given.items()}
    axes = ({k: axis if k in mapped else None for k in given},)
    got = jax.jit(jax.vmap(both, in_axes=axes))(moved)
    for i in range(3):
        one = {k: x[i if k in mapped else 0] for k, x in given.items()}
        equal([x[i] for x in got], reference(one))


def test_nested_vmap() -> None:
    given = {k: np.stack([x, x[::-1]]) for k, x in stacked().items()}
    got = jax.jit(jax.vmap(jax.vmap(both)))(given)
    for j, i in np.ndindex(2, 3):
        equal([x[j, i] for x in got], reference({k: x[j, i] for k, x in given.items()}))


@pytest.mark.parametrize("implementation", ["kernel", "xla"])
def test_vmap_of_given_scores(implementation: str) -> None:
    given = stacked()
    names = ("block_table", "cache_seqlens")
    table = {k: given[k] for k in names}
    scores = np.random.default_rng(0).integers(-9, 9, (3, 2, 2, 256)).astype(np.float32)
    pick = functools.partial(select, implementation=implementation)
    got = jax.jit(jax.vmap(pick))({**table, "scores": scores})
    last = jax.vmap(pick, in_axes=({"scores": None, **dict.fromkeys(names, 0)},))(
        {**table, "scores": scores[0]}
    )
    for i in range(3):
        one = {k: x[i] for k, x in table.items()}
        equal([x[i] for x in got], select({**one, "scores": scores[i]}))
        equal([x[i] for x in last], select({**one, "scores": scores[0]}))


def test_vmap_over_nothing_but_the_schedule() -> None:
    lengths = np.array([[64, 128], [9, 0]], np.int32)
    schedules = jax.vmap(functools.partial(make_schedule, h_q=1, num_parts=3))(lengths)
    got = jax.vmap(lambda s: both(arrays(), schedule=s))(schedules)
    for i in range(2):
        equal([x[i] for x in got], reference(arrays()))


def test_vmap_of_too_many_slots_or_sequences() -> None:
    shapes = {k: jax.ShapeDtypeStruct((5, *x.shape), x.dtype) for k, x in arrays().items()}
    huge = dict(shapes, blocks=jax.ShapeDtypeStruct((5, 2**23, 64 * 132), jnp.uint8))
    for call in (score, topk):
        with pytest.raises(
            ValueError, match=r"at most 2\^31 - 1 slots over the mapped axis, got 5"
        ):
            jax.eval_shape(jax.vmap(call), huge)
    many = {k: jax.ShapeDtypeStruct((9000, *x.shape), x.dtype) for k, x in arrays().items()}
    with pytest.raises(ValueError, match="index_topk under vmap must have at most 16384 sequences"):
        jax.eval_shape(jax.vmap(topk), many)


# Differentiation.


@pytest.mark.parametrize("name", ["index_scores", "index_topk"])
def test_derivative_is_an_error_that_names_the_alternative(name: str) -> None:
    call = {"index_scores": score, "index_topk": topk}[name]
    message = rf'{name} cannot be differentiated.*\(\.\.\., implementation="xla"\)'

    def loss(weights: jax.Array) -> jax.Array:
        first = jax.tree.leaves(call({**arrays(), "weights": weights}))[0]
        return jnp.sum(first.astype(jnp.float32))

    for transform in (jax.grad, jax.jacfwd):
        with pytest.raises(NotImplementedError, match=message):
            transform(loss)(arrays()["weights"])


def test_reference_is_differentiable_and_its_gradient_is_right() -> None:
    """Also where the rest of a block is poison."""
    made = index_cases.make_problem(IndexCase(b=2, s_q=2, heads=3, s_k=70, dtype="bfloat16"))
    q, weights = (jnp.asarray(made.arguments.pop(name)) for name in ("q", "weights"))

    def value(weights: jax.Array, q: jax.Array) -> jax.Array:
        scores = index_scores(q, weights, **made.arguments, implementation="xla")
        return jnp.sum(jnp.where(scores == -jnp.inf, 0, scores) ** 2)

    gradient, of_q = jax.jit(jax.grad(value, argnums=(0, 1)))(weights, q)
    assert np.isfinite(np.asarray(of_q, np.float32)).all()
    direction = np.random.default_rng(2).standard_normal(weights.shape).astype(np.float32)
    step = 1e-2
    value = jax.jit(value)
    slope = (value(weights + step * direction, q) - value(weights - step * direction, q)) / (
        2 * step
    )
    np.testing.assert_allclose(np.sum(np.asarray(gradient) * direction), slope, rtol=1e-3)


# Over devices.


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=lambda t: t.name)
def test_shard_map_over_sequences_needs_no_communication(axis_type: AxisType) -> None:
    """Each shard has the blocks of its own sequences."""
    mesh = jax.make_mesh((4,), ("x",), axis_types=(axis_type,), devices=jax.devices("cpu")[:4])
    shards = [index_cases.make_problem(IndexCase(b=2, heads=3, s_k=s_k)) for s_k in range(97, 101)]
    names = ("q", "weights", "blocks", "block_table", "cache_seqlens")
    specs = (PartitionSpec("x"),) * 5
    given = [
        jax.device_put(
            np.concatenate([shard.arguments[name] for shard in shards]),
            NamedSharding(mesh, PartitionSpec("x")),
        )
        for name in names
    ]

    def local(*given: jax.Array) -> tuple:
        assert given[0].shape[0] == 2
        options = {"format": FORMAT, "topk": TOPK, "return_positions": True}
        return index_scores(*given, format=FORMAT), *index_topk(*given, **options)

    sharded = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=specs[:3]))
    hlo = sharded.lower(*given).compile().as_text()
    assert "flashmla_index_topk_v1" in hlo
    collectives = ("all-gather", "all-reduce", "all-to-all", "collective-permute")
    assert not [name for name in collectives if name in hlo]
    scores, indices, positions = map(np.asarray, sharded(*given))
    expected = np.concatenate([shard.expected for shard in shards])
    tolerances.assert_close("scores", scores, expected, tolerances.F32_INDEX_SCORES)
    for i, shard in enumerate(shards):
        here = slice(2 * i, 2 * i + 2)
        best = index_cases.naive_topk(shard.expected, shard.visible, TOPK)
        np.testing.assert_array_equal(positions[here], best)
        slots = index_cases.slots_of(best, shard.arguments["block_table"])
        np.testing.assert_array_equal(indices[here], slots)


# Export and lowering.


def lowered(function: Any, platform: str) -> str:
    shapes = {k: jax.ShapeDtypeStruct(x.shape, x.dtype) for k, x in arrays().items()}
    return jax.jit(function).trace(shapes).lower(lowering_platforms=(platform,)).as_text()


def test_export_for_cpu_and_cuda_and_back() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of what has no Hopper kernel
        exported = jax.export.export(
            jax.jit(both), platforms=("cpu", "cuda"), disabled_checks=export_checks()
        )(arrays())
    restored = jax.export.deserialize(exported.serialize())
    equal(jax.jit(restored.call)(arrays()), reference(arrays()))


@pytest.mark.parametrize("name", ["index_scores", "index_topk"])
def test_lowering_for_cuda(name: str) -> None:
    call = {"index_scores": score, "index_topk": topk}[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert f"flashmla_{name}_v1" in lowered(call, "cuda")


def test_lowering_for_a_platform_without_kernels_is_the_reference() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "flashmla" not in lowered(both, "tpu")
