"""sparse_decode under JAX's transformations, over devices, and made here to run elsewhere."""

from __future__ import annotations

import dataclasses
import functools
import re
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import sparse_cases
import tolerances
from jax_flashmla import CacheFormat, export_checks, make_schedule, sparse_decode
from jax_flashmla._xla import dispatch
from sparse_cases import Cache, SparseCase

pytestmark = pytest.mark.usefixtures("on_cpu")

CASE = SparseCase(
    Cache("dense", 30, 70, 4, layers=3), Cache("dense", 20, 9, 5, layers=3), b=2, s_q=2, h_q=4,
    d_qk=24, d_v=16, dtype="float32", lengths="b s_q", sink=True,
)  # fmt: skip
STATIC = ("d_v", "sm_scale", "format", "extra_format", "layer_blocks", "extra_layer_blocks")


@functools.cache
def problem(case: SparseCase = CASE) -> tuple[dict, dict, tuple]:
    """Arrays, static arguments and what they come to."""
    made = sparse_cases.make_problem(case)
    static = {k: v for k, v in made.arguments.items() if k in STATIC}
    arrays = {k: jnp.asarray(v) for k, v in made.arguments.items() if k not in STATIC}
    arrays = {k: x.astype(jnp.int32) if x.ndim == 0 else x for k, x in arrays.items()}
    return arrays, static, made.expected


def decode(arrays: dict, **options: Any) -> tuple[jax.Array, jax.Array]:
    return sparse_decode(**{**arrays, **problem()[1], **options})


reference = jax.jit(functools.partial(decode, implementation="xla"))


def check(got: tuple, expected: tuple) -> None:
    tolerances.assert_decoded(got, expected, **tolerances.F32_DECODE)


def equal(got: tuple, expected: tuple) -> None:
    for x, y in zip(got, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def test_jit_eager_64_bits_and_disabled_jit_agree() -> None:
    arrays, _, expected = problem()
    eager = decode(arrays)
    check(eager, expected)
    equal(jax.jit(decode)(arrays), eager)
    with jax.disable_jit():
        equal(decode(arrays), eager)
    with jax.enable_x64(True):
        got = decode(arrays)
        assert [x.dtype for x in got] == [jnp.float32, jnp.float32]
        equal(got, eager)
        wide = {k: v.astype(np.int64) if "ind" in k else v for k, v in arrays.items()}
        equal(jax.jit(decode)(wide), eager)


def test_abstract_shapes() -> None:
    arrays, static, _ = problem()
    shapes = {k: jax.ShapeDtypeStruct(x.shape, x.dtype) for k, x in arrays.items()}
    out, lse = jax.eval_shape(functools.partial(sparse_decode, **static), **shapes)
    assert (out.shape, out.dtype) == ((2, 2, 4, 16), jnp.float32)
    assert (lse.shape, lse.dtype) == ((2, 2, 4), jnp.float32)


# vmap.


def stacked(n: int = 3) -> dict[str, np.ndarray]:
    """n problems, whose caches hold no poison: any slot of a layer may be attended."""
    rng = np.random.default_rng(1)
    arrays = {k: np.asarray(x) for k, x in problem()[0].items()}

    def another(name: str, x: np.ndarray) -> np.ndarray:
        if "blocks" in name or name == "q":
            return rng.standard_normal(x.shape, np.float32)
        if name == "attn_sink":
            return rng.standard_normal(x.shape, np.float32)
        if name.endswith("first_block"):
            return rng.integers(-1, 20, x.shape).astype(np.int32)  # clamped to the array
        if "length" in name:
            return rng.integers(-1, 72, x.shape).astype(np.int32)
        return rng.integers(-3, 40, x.shape).astype(np.int32)  # some outside the layer

    return {k: np.stack([another(k, x) for _ in range(n)]) for k, x in arrays.items()}


@pytest.mark.parametrize(
    ("mapped", "axis"),
    [
        (None, 0),
        (("q",), -1),
        (("blocks",), 1),
        (("first_block",), 0),
        (("indices", "topk_length"), -1),
        (("extra_blocks", "first_block"), 0),
        (("extra_first_block", "extra_indices", "q"), 0),
        (("attn_sink", "blocks", "q"), -1),
    ],
    ids=str,
)
def test_vmap(mapped: tuple[str, ...] | None, axis: int) -> None:
    arrays = stacked()
    mapped = tuple(arrays) if mapped is None else mapped
    given = {k: np.moveaxis(x, 0, axis) if k in mapped else x[0] for k, x in arrays.items()}
    axes = ({k: axis if k in mapped else None for k in arrays},)
    outs, lses = jax.jit(jax.vmap(decode, in_axes=axes))(given)
    for i in range(3):
        one = {k: x[i if k in mapped else 0] for k, x in arrays.items()}
        check((outs[i], lses[i]), reference(one))


def test_vmap_of_caches_of_too_many_slots_together() -> None:
    """2^31 slots do not count in int32: the calls are made one after the other."""
    format = CacheFormat(name="v32", block_size=2**15)
    shapes = (
        jax.ShapeDtypeStruct((3, 1, 1, 2, 576), jnp.bfloat16),
        jax.ShapeDtypeStruct((3, 2**15 - 1, *format.block_shape), jnp.uint8),
        jax.ShapeDtypeStruct((3, 1, 1, 7), jnp.int32),
    )
    one = functools.partial(sparse_decode, format=format)
    text = str(jax.make_jaxpr(jax.vmap(one))(*shapes))
    assert "scan" in text
    assert "scan" not in str(
        jax.make_jaxpr(jax.vmap(one, in_axes=(0, None, 0)))(
            shapes[0], jax.ShapeDtypeStruct(shapes[1].shape[1:], jnp.uint8), shapes[2]
        )
    )


def test_vmap_over_nothing_but_the_schedule() -> None:
    arrays, _, expected = problem()
    lengths = np.array([[64, 128, 0, 64], [64, 64, 64, 192]], np.int32)
    schedules = jax.vmap(functools.partial(make_schedule, h_q=4, num_parts=3))(lengths)
    outs, lses = jax.vmap(lambda s: decode(arrays, schedule=s))(schedules)
    for i in range(2):
        check((outs[i], lses[i]), expected)


def test_nested_vmap() -> None:
    arrays = {k: np.stack([x, x[::-1]]) for k, x in stacked().items()}
    outs, lses = jax.jit(jax.vmap(jax.vmap(decode)))(arrays)
    for j, i in np.ndindex(2, 3):
        one = {k: x[j, i] for k, x in arrays.items()}
        check((outs[j, i], lses[j, i]), reference(one))


# Differentiation.


def loss(q: jax.Array, implementation: str | None) -> jax.Array:
    out, lse = decode({**problem()[0], "q": q}, implementation=implementation)
    return jnp.sum(out**2) + jnp.sum(jnp.where(lse == -jnp.inf, 0, lse))


@pytest.mark.parametrize("transform", [jax.grad, jax.jacfwd, lambda f: jax.grad(jax.jit(f))])
def test_derivative_is_an_error_that_names_the_alternative(transform: Any) -> None:
    message = r'sparse_decode cannot be differentiated.*\(\.\.\., implementation="xla"\)'
    with pytest.raises(NotImplementedError, match=message):
        transform(functools.partial(loss, implementation=None))(problem()[0]["q"])


def test_reference_is_differentiable_and_its_gradient_is_right() -> None:
    q = problem()[0]["q"]
    value = functools.partial(loss, implementation="xla")
    gradient = np.asarray(jax.jit(jax.grad(value))(q), np.float64)
    assert np.isfinite(gradient).all()
    direction = np.random.default_rng(2).standard_normal(q.shape).astype(np.float32)
    step = 2e-3
    slope = (value(q + step * direction) - value(q - step * direction)) / (2 * step)
    np.testing.assert_allclose((gradient * direction).sum(), slope, rtol=2e-2)


# Over devices.


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=lambda t: t.name)
def test_shard_map_over_batch_and_heads_needs_no_communication(axis_type: AxisType) -> None:
    """Each batch shard has the blocks of its own sequences, as dense_decode's."""
    mesh = jax.make_mesh(
        (2, 4), ("x", "y"), axis_types=(axis_type,) * 2, devices=jax.devices("cpu")
    )
    case = dataclasses.replace(CASE, main=Cache("dense", 30, 70, 4), extra=None, b=4, h_q=8)
    shards = [sparse_cases.make_problem(case), sparse_cases.make_problem(case)]
    names = ("q", "blocks", "indices", "topk_length", "attn_sink")
    specs = (
        PartitionSpec("x", None, "y"),
        PartitionSpec("x"),
        PartitionSpec("x"),
        PartitionSpec("x"),
        PartitionSpec("y"),
    )
    arrays = [
        shards[0].arguments[name]
        if name == "attn_sink"
        else np.concatenate([shard.arguments[name] for shard in shards])
        for name in names
    ]
    arrays = [
        jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(arrays, specs, strict=True)
    ]

    def local(q: jax.Array, blocks: jax.Array, indices: jax.Array, *rest: jax.Array) -> tuple:
        assert q.shape == (4, 2, 2, 24)
        lengths, sink = rest
        return sparse_decode(q, blocks, indices, topk_length=lengths, attn_sink=sink, d_v=16)

    out_specs = (PartitionSpec("x", None, "y"), PartitionSpec("x", None, "y"))
    sharded = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=out_specs))
    hlo = sharded.lower(*arrays).compile().as_text()
    assert "flashmla_sparse_decode_v1" in hlo
    collectives = ("all-gather", "all-reduce", "all-to-all", "collective-permute")
    assert not [name for name in collectives if name in hlo]
    expected = [np.concatenate([shard.expected[i] for shard in shards]) for i in range(2)]
    check(sharded(*arrays), tuple(expected))


# Export and lowering.


def v32_call(**options: Any) -> tuple[Any, tuple]:
    format = CacheFormat(name=options.pop("name", "v32"), block_size=16)
    shapes = (
        jax.ShapeDtypeStruct((2, 1, 16, format.d_qk), options.pop("dtype", jnp.bfloat16)),
        jax.ShapeDtypeStruct((9, *format.block_shape), jnp.uint8),
        jax.ShapeDtypeStruct((2, 1, 100), jnp.int32),
    )
    return functools.partial(sparse_decode, format=format, **options), shapes


def lowered(function: Any, shapes: tuple, platform: str) -> str:
    return jax.jit(function).trace(*shapes).lower(lowering_platforms=(platform,)).as_text()


def test_export_for_cpu_and_cuda_and_back() -> None:
    case = SparseCase(Cache("v32", 60, 70, 16), b=2, h_q=4)
    made = sparse_cases.make_problem(case)
    function = jax.jit(functools.partial(sparse_decode, format=made.arguments["format"]))
    arrays = [made.arguments[name] for name in ("q", "blocks", "indices")]
    exported = jax.export.export(
        function, platforms=("cpu", "cuda"), disabled_checks=export_checks()
    )(*arrays)
    restored = jax.export.deserialize(exported.serialize())
    tolerances.assert_decoded(
        jax.jit(restored.call)(*arrays), made.expected, out=tolerances.SPARSE_OUT
    )


def test_lowering_for_cuda_of_what_the_kernel_takes() -> None:
    text = lowered(*v32_call(), "cuda")
    assert text.count("@flashmla_sparse_decode_v1(") == 1
    assert text.count("@flashmla_make_schedule_v1(") == 1
    assert "layer_blocks = 9 : i32" in text


def test_lowering_for_cuda_of_what_the_kernel_does_not_take() -> None:
    dispatch.warn_once.cache_clear()
    message = "take d_qk = 512 or 576 and d_v = 512, got d_qk = 576 and d_v = 256"
    with pytest.warns(RuntimeWarning, match=message):
        text = lowered(*v32_call(d_v=256), "cuda")
    assert "flashmla_sparse_decode" not in text
    function, shapes = v32_call(d_v=256, implementation="kernel")
    with pytest.raises(NotImplementedError, match=message):
        lowered(function, shapes, "cuda")


@pytest.mark.parametrize("name", ["v32_nope", "v4", "v41", "fp8_row"])
def test_lowering_for_cuda_of_other_formats(name: str) -> None:
    assert "@flashmla_sparse_decode_v1(" in lowered(*v32_call(name=name), "cuda")


def test_lowering_for_a_platform_without_kernels_is_the_reference() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "flashmla" not in lowered(*v32_call(), "tpu")


@pytest.mark.parametrize(
    ("b", "h_q", "num_parts"),
    [(1, 16, 132), (1, 128, 16), (8, 128, 66), (64, 128, 66), (64, 64, 132), (64, 200, 33)],
)
def test_parts_are_as_many_as_the_kernel_takes_at_once(b: int, h_q: int, num_parts: int) -> None:
    """Of an H100: tiles of 16 heads in a small problem, of 32 where those of 64 make no pairs."""
    format = CacheFormat(name="v32", block_size=4)
    shapes = (
        jax.ShapeDtypeStruct((b, 1, h_q, 576), jnp.bfloat16),
        jax.ShapeDtypeStruct((2, *format.block_shape), format.storage_dtype),
        jax.ShapeDtypeStruct((b, 1, 2048), jnp.int32),
    )
    assert parts(functools.partial(sparse_decode, format=format), shapes) == [str(num_parts)]


@pytest.mark.parametrize(("b", "num_parts"), [(1, 32), (3, 66)])
def test_other_formats_have_tiles_of_64_heads_alone(b: int, num_parts: int) -> None:
    """And no more parts than their 32 tiles of tokens for each sequence."""
    shapes = (
        jax.ShapeDtypeStruct((b, 1, 128, 576), jnp.bfloat16),
        jax.ShapeDtypeStruct((2, 4, 1, 576), jnp.bfloat16),
        jax.ShapeDtypeStruct((b, 1, 2048), jnp.int32),
    )
    assert parts(sparse_decode, shapes) == [str(num_parts)]


def parts(function: Callable, shapes: tuple) -> list[str]:
    jaxpr = str(jax.make_jaxpr(function)(*shapes))
    return re.findall(r"flashmla_make_schedule\[[^\]]*num_parts=(\d+)", jaxpr)


def test_a_step_with_many_layers_makes_one_schedule() -> None:
    function, (q, blocks, indices) = v32_call()

    def layers(q: jax.Array, blocks: jax.Array, indices: jax.Array) -> list:
        lengths = jnp.minimum(indices[:, :, 0], 50)
        return [function(q * i, blocks, indices, topk_length=lengths) for i in range(1, 4)]

    hlo = jax.jit(layers).lower(q, blocks, indices).compile().as_text()
    calls = [line for line in hlo.splitlines() if "custom_call_target" in line]
    assert sum("sparse_decode_v1" in line for line in calls) == 3
    assert sum("make_schedule_v1" in line for line in calls) == 1
