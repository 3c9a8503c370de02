"""The operations under JAX's transformations and ahead-of-time paths, on the CPU's handlers."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import cases
import tolerances
from jax_flashmla import (
    _ffi,
    decode_specs,
    dense_decode,
    export_checks,
    kernel_refusal,
    make_schedule,
)

D_V = 16
SMALL = functools.partial(cases.DecodeCase, d_qk=24, d_v=D_V, block_size=8)
decode = functools.partial(dense_decode, d_v=D_V)


@pytest.fixture(autouse=True)
def on_cpu() -> Iterator[None]:
    with jax.default_device(jax.devices("cpu")[0]):
        yield


def append(blocks: jax.Array, rows: jax.Array, table: jax.Array, positions: jax.Array) -> jax.Array:
    num_new = jnp.full(rows.shape[0], rows.shape[1], jnp.int32)
    return _ffi.cache_append(blocks, rows, table, positions, num_new, implementation=None)


def assert_same(got: tuple, expected: tuple) -> None:
    tolerances.assert_close("out", got[0], expected[0], tolerances.OUT)
    tolerances.assert_close("lse", got[1], expected[1], tolerances.LSE)


def growing_cache(steps: int, b: int = 2) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """An empty cache, a table with room for `steps` tokens, and the rows [steps, b, 1, 1, 24]."""
    table = np.arange(b * -(-steps // 8), dtype=np.int32).reshape(b, -1)
    rows = cases.normal(np.random.default_rng(cases.SEED), (steps, b, 1, 1, 24), "bfloat16")
    blocks = np.full((table.size, 8, 1, 24), np.nan, rows.dtype)
    return blocks, table, rows


def attend_growing(rows: np.ndarray, q: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    keys = np.moveaxis(rows[:length, :, 0], 0, 1)  # [b, length, 1, 24]
    results = [cases.naive_attention(q[i], keys[i], length, d_v=D_V) for i in range(len(q))]
    outs, lses = zip(*results, strict=True)
    return np.stack(outs), np.stack(lses)


# Control flow.


def test_jit_eager_and_disabled_jit_agree() -> None:
    inputs = cases.make_inputs(SMALL(3, 2, 40, 4))
    eager = decode(*inputs.arguments)
    jitted = jax.jit(decode)(*inputs.arguments)
    with jax.disable_jit():
        unjitted = decode(*inputs.arguments)
    for got in (jitted, unjitted):
        np.testing.assert_array_equal(got[0], eager[0])
        np.testing.assert_array_equal(got[1], eager[1])


def test_fori_loop_appends_and_attends_each_step() -> None:
    steps = 19
    blocks, table, rows = growing_cache(steps)
    q = cases.normal(np.random.default_rng(1), (2, 1, 3, 24), "bfloat16")

    @functools.partial(jax.jit, donate_argnums=0)
    def run(blocks: jax.Array, rows: jax.Array) -> tuple:
        def step(i: jax.Array, carry: tuple) -> tuple:
            blocks, outs, lses = carry
            positions = jnp.full(2, i, jnp.int32)
            blocks = append(blocks, rows[i], table, positions)
            out, lse = decode(q, blocks, table, positions + 1)
            return blocks, outs.at[i].set(out), lses.at[i].set(lse)

        outs = jnp.zeros((steps, 2, 1, 3, D_V), jnp.bfloat16)
        return jax.lax.fori_loop(0, steps, step, (blocks, outs, jnp.zeros((steps, 2, 1, 3))))

    _, outs, lses = run(jnp.asarray(blocks), jnp.asarray(rows))
    for i in range(steps):
        assert_same((outs[i], lses[i]), attend_growing(rows, q, i + 1))


def test_scan_over_layers_with_a_stacked_cache() -> None:
    inputs = [cases.make_inputs(SMALL(2, 1, 30, h)) for h in (4, 4)]
    layers = jnp.stack([jnp.asarray(inputs[0].blocks), jnp.asarray(inputs[1].blocks) * 2])
    _, _, table, lengths = inputs[0].arguments
    q = jnp.asarray(inputs[0].q)

    @jax.jit
    def scanned(layers: jax.Array) -> tuple[jax.Array, jax.Array]:
        schedule = make_schedule(lengths, h_q=4)

        def layer(q: jax.Array, blocks: jax.Array) -> tuple:
            out, lse = decode(q, blocks, table, lengths, schedule=schedule)
            return jnp.pad(out, ((0, 0),) * 3 + ((0, 24 - D_V),)), (out, lse)

        return jax.lax.scan(layer, q, layers)[1]

    outs, lses = scanned(layers)
    first = decode(q, layers[0], table, lengths)
    second_q = jnp.pad(first[0], ((0, 0),) * 3 + ((0, 24 - D_V),))
    assert_same((outs[0], lses[0]), first)
    assert_same((outs[1], lses[1]), decode(second_q, layers[1], table, lengths))


# vmap.


def vmap_inputs(n: int = 3) -> tuple[np.ndarray, ...]:
    """n problems of one shape, their caches of equal size; ids out of range in some tables."""
    case = SMALL(2, 2, 30, 4, 2, ragged=False)
    rng = np.random.default_rng(cases.SEED)
    inputs = [cases.make_inputs(case) for _ in range(n)]
    q = np.stack([i.q * (k + 1) for k, i in enumerate(inputs)])
    blocks = np.stack(
        [np.where(np.isnan(i.blocks), 1, i.blocks) * (k + 1) for k, i in enumerate(inputs)]
    )
    tables = np.stack([rng.permuted(i.block_table, axis=1) for i in inputs])
    tables[0, 0, 0], tables[n - 1, 1, 1] = -1, blocks.shape[1]  # must not read a neighbour's cache
    lengths = rng.integers(0, 33, (n, 2)).astype(np.int32)
    return q, blocks, tables, lengths


@pytest.mark.parametrize(
    "axes",
    [
        (0, 0, 0, 0),
        (0, None, None, None),
        (None, 0, None, None),
        (None, None, 0, None),
        (None, None, None, 0),
        (0, None, 0, 0),
        (2, 1, 1, 1),
    ],
    ids=str,
)
@pytest.mark.parametrize("given", ["schedule given", "no schedule"])
def test_vmap(axes: tuple, given: str) -> None:
    arrays = vmap_inputs()
    arguments = [
        array[0] if axis is None else np.moveaxis(array, 0, axis)
        for array, axis in zip(arrays, axes, strict=True)
    ]

    def one(q: jax.Array, blocks: jax.Array, table: jax.Array, lengths: jax.Array) -> tuple:
        schedule = make_schedule(lengths, h_q=4, h_kv=2, num_parts=3) if given[0] == "s" else None
        return decode(q, blocks, table, lengths, schedule=schedule)

    outs, lses = jax.jit(jax.vmap(one, in_axes=axes))(*arguments)
    for i in range(3):
        here = [a[0 if axis is None else i] for a, axis in zip(arrays, axes, strict=True)]
        assert_same((outs[i], lses[i]), decode(*here, implementation="xla"))


def test_vmap_over_nothing_but_the_schedule() -> None:
    inputs = cases.make_inputs(SMALL(2, 1, 30, 4))
    lengths = np.stack([inputs.cache_seqlens, np.array([1, 30], np.int32)])
    schedules = jax.vmap(functools.partial(make_schedule, h_q=4, num_parts=4))(lengths)
    assert schedules.cuts.shape == (2, 5, 2)
    for i in range(2):
        one = make_schedule(lengths[i], h_q=4, num_parts=4)
        np.testing.assert_array_equal(schedules.cuts[i], one.cuts)
    outs, lses = jax.vmap(lambda s: decode(*inputs.arguments, schedule=s))(schedules)
    expected = decode(*inputs.arguments)
    for i in range(2):
        assert_same((outs[i], lses[i]), expected)


def test_nested_vmap() -> None:
    q, blocks, tables, lengths = vmap_inputs()
    qs = np.stack([q, q * 2])
    inner = jax.vmap(decode)
    outs, lses = jax.vmap(inner, in_axes=(0, None, None, None))(qs, blocks, tables, lengths)
    for j in range(2):
        for i in range(3):
            expected = decode(qs[j, i], blocks[i], tables[i], lengths[i], implementation="xla")
            assert_same((outs[j, i], lses[j, i]), expected)


@pytest.mark.parametrize("axes", [(0, 0, 0, 0), (0, None, None, None), (None, 0, 0, 0)], ids=str)
def test_vmap_of_cache_append(axes: tuple) -> None:
    _, blocks, tables, _ = vmap_inputs()
    rows = cases.normal(np.random.default_rng(2), (3, 2, 5, 2, 24), "bfloat16")
    positions = np.array([[0, 7], [30, 3], [12, 28]], np.int32)  # some past the table's end
    arrays = (blocks, rows, tables, positions)
    arguments = [a[0] if axis is None else a for a, axis in zip(arrays, axes, strict=True)]
    got = jax.jit(jax.vmap(append, in_axes=axes))(*arguments)
    for i in range(3):
        here = [a[0 if axis is None else i] for a, axis in zip(arrays, axes, strict=True)]
        np.testing.assert_array_equal(got[i], append(*here))


def test_vmap_to_more_sequences_than_a_schedule_holds() -> None:
    q = jnp.zeros((4000, 5, 1, 1, 24), jnp.bfloat16)
    blocks, table, _ = growing_cache(8, b=5)
    lengths = np.zeros(5, np.int32)
    message = "dense_decode under vmap must have at most 16384 sequences .* got 4000 times b = 5"
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(jax.vmap(lambda q: decode(q, blocks, table, lengths)), q)


# Differentiation.


def squares(q: jax.Array, inputs: cases.DecodeInputs, implementation: str | None) -> jax.Array:
    out, lse = decode(q, *inputs.arguments[1:], causal=True, implementation=implementation)
    return jnp.sum(out.astype(jnp.float32) ** 2) + jnp.sum(jnp.where(lse == -jnp.inf, 0, lse))


@pytest.mark.parametrize("transform", ["jvp", "grad", "vjp", "jacfwd", "grad of jit", "append"])
def test_derivative_is_an_error_that_names_the_alternative(transform: str) -> None:
    inputs = cases.make_inputs(SMALL(2, 2, 30, 4))
    q = jnp.asarray(inputs.q)
    function = functools.partial(squares, inputs=inputs, implementation=None)
    if transform == "append":
        _, table, rows = growing_cache(8)
        blocks = jnp.zeros((2, 8, 1, 24), jnp.bfloat16)
        position = jnp.zeros(2, jnp.int32)

        def function(x: jax.Array) -> jax.Array:
            return append(blocks, x, table, position).sum().astype(jnp.float32)

        q = jnp.asarray(rows[0])
    run = {
        "jvp": lambda: jax.jvp(function, (q,), (q,)),
        "grad": lambda: jax.grad(function)(q),
        "vjp": lambda: jax.vjp(function, q),
        "jacfwd": lambda: jax.jacfwd(function)(q),
        "grad of jit": lambda: jax.grad(jax.jit(function))(q),
        "append": lambda: jax.grad(function)(q),
    }[transform]
    name = "cache_append" if transform == "append" else "dense_decode"
    message = rf'{name} cannot be differentiated.*{name}\(\.\.\., implementation="xla"\)'
    with pytest.raises(NotImplementedError, match=message):
        run()


def test_reference_is_differentiable_and_its_gradient_is_right() -> None:
    inputs = cases.make_inputs(SMALL(3, 2, 30, 4, zero_lengths=True))
    blocks = jnp.asarray(inputs.blocks)

    def total(q: jax.Array, blocks: jax.Array) -> jax.Array:
        arguments = (q, blocks, *inputs.arguments[2:])
        out, lse = decode(*arguments, causal=True, implementation="xla")
        return jnp.sum(out.astype(jnp.float32)) + jnp.sum(jnp.where(lse == -jnp.inf, 0, lse))

    grad_q, grad_blocks = jax.grad(total, argnums=(0, 1))(jnp.asarray(inputs.q), blocks)
    assert np.isfinite(np.asarray(grad_q, np.float32)).all()
    assert np.isfinite(
        np.asarray(grad_blocks, np.float32)
    ).all()  # NaN in unused slots of the cache included
    assert np.asarray(grad_q).any()
    owned = np.unique(inputs.block_table[inputs.block_table < len(blocks)])
    unowned = np.setdiff1d(np.arange(len(blocks)), owned)
    assert not np.asarray(grad_blocks)[unowned].any()
    assert np.asarray(grad_blocks)[owned].any()

    # d lse / d q is the mean key under the attention weights, times the scale.
    i, head = int(np.argmax(inputs.cache_seqlens)), 2
    length = int(inputs.cache_seqlens[i])
    keys = inputs.keys[i, :length, 0].astype(np.float64)
    scores = keys @ inputs.q[i, 1, head].astype(np.float64) * 24**-0.5
    weights = np.exp(scores - scores.max())

    def one_lse(q: jax.Array) -> jax.Array:
        return decode(q, *inputs.arguments[1:], causal=True, implementation="xla")[1][i, 1, head]

    gradient = jax.grad(one_lse)(jnp.asarray(inputs.q))[i, 1, head]
    expected = weights @ keys / weights.sum() * 24**-0.5
    tolerances.assert_close("gradient", gradient, expected, tolerances.GRADIENT)


def test_gradient_of_what_only_passes_by_is_allowed() -> None:
    inputs = cases.make_inputs(SMALL(2, 1, 30, 4))

    def loss(x: jax.Array) -> jax.Array:
        out, _ = decode(*inputs.arguments)
        return jnp.sum(out.astype(jnp.float32)) * x

    out, _ = decode(*inputs.arguments)
    np.testing.assert_allclose(jax.grad(loss)(2.0), np.asarray(out, np.float32).sum(), rtol=1e-5)


# Devices.

COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")


def sharded_problem(batch_shards: int) -> tuple[tuple[np.ndarray, ...], tuple]:
    """Arguments with block ids local to each batch shard, and what they come to."""
    case = SMALL(8, 2, 40, 8, ragged=True)
    q, blocks, tables, lengths, outs, lses = [], [], [], [], [], []
    for shard in range(batch_shards):
        whole = cases.make_inputs(case)
        mine = slice(shard * 8 // batch_shards, (shard + 1) * 8 // batch_shards)
        q.append(whole.q[mine])
        blocks.append(whole.blocks)
        tables.append(whole.block_table[mine])
        lengths.append(whole.cache_seqlens[mine])
        out, lse = cases.naive_decode(case, whole)
        outs.append(out[mine])
        lses.append(lse[mine])
    arguments = tuple(np.concatenate(x) for x in (q, blocks, tables, lengths))
    return arguments, (np.concatenate(outs), np.concatenate(lses))


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=lambda t: t.name)
@pytest.mark.parametrize("layout", ["heads", "batch", "both"])
def test_shard_map_needs_no_communication(layout: str, axis_type: AxisType) -> None:
    batch, heads = {"heads": (1, 8), "batch": (8, 1), "both": (4, 2)}[layout]
    mesh = jax.make_mesh(
        (batch, heads), ("x", "y"), axis_types=(axis_type,) * 2, devices=jax.devices("cpu")
    )
    specs = decode_specs(
        batch="x" if layout != "heads" else None, heads="y" if layout != "batch" else None
    )
    arguments, expected = sharded_problem(batch)
    arguments = [
        jax.device_put(x, NamedSharding(mesh, spec))
        for x, spec in zip(arguments, specs.in_specs, strict=True)
    ]

    def local(*arguments: jax.Array) -> tuple[jax.Array, jax.Array]:
        assert arguments[0].shape == (8 // batch, 2, 8 // heads, 24)
        schedule = make_schedule(arguments[3], h_q=8 // heads, s_q=2)
        return decode(*arguments, schedule=schedule)

    sharded = jax.jit(
        jax.shard_map(
            local, mesh=mesh, in_specs=specs.in_specs, out_specs=specs.out_specs, check_vma=True
        )
    )
    hlo = sharded.lower(*arguments).compile().as_text()
    assert "flashmla_dense_decode_v1" in hlo
    assert not [name for name in COLLECTIVES if name in hlo]
    out, lse = sharded(*arguments)
    assert_same((out, lse), expected)
    assert out.sharding.is_equivalent_to(NamedSharding(mesh, specs.out), 4)


def test_shard_map_with_the_caches_heads_split() -> None:
    mesh = jax.make_mesh((8,), ("y",), axis_types=(AxisType.Auto,), devices=jax.devices("cpu"))
    case = SMALL(2, 1, 40, 16, 8)
    inputs = cases.make_inputs(case)
    specs = decode_specs(heads="y", shard_kv_heads=True)
    sharded = jax.jit(
        jax.shard_map(decode, mesh=mesh, in_specs=specs.in_specs, out_specs=specs.out_specs)
    )
    hlo = sharded.lower(*inputs.arguments).compile().as_text()
    assert not [name for name in COLLECTIVES if name in hlo]
    assert_same(sharded(*inputs.arguments), cases.naive_decode(case, inputs))


def test_shard_map_of_appending_and_attending_in_a_loop() -> None:
    """Batch and heads split, the cache replicated over heads: its writes are, too."""
    mesh = jax.make_mesh(
        (4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices("cpu")
    )
    steps = 11
    blocks, table, rows = growing_cache(steps, b=4)
    local_table = table % table.shape[1]  # each shard of x has one sequence and its blocks
    q = cases.normal(np.random.default_rng(1), (4, 1, 6, 24), "bfloat16")
    specs = decode_specs(batch="x", heads="y")

    def local(q: jax.Array, blocks: jax.Array, table: jax.Array, rows: jax.Array) -> tuple:
        def step(carry: jax.Array, row: jax.Array) -> tuple:
            blocks, positions = carry
            blocks = append(blocks, row, table, positions)
            return (blocks, positions + 1), decode(q, blocks, table, positions + 1)

        start = jax.lax.pcast(jnp.zeros(q.shape[0], jnp.int32), "x", to="varying")
        (blocks, _), results = jax.lax.scan(step, (blocks, start), rows)
        return blocks, *results

    by_step = [PartitionSpec(None, *spec) for spec in specs.out_specs]
    sharded = jax.jit(
        jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(specs.q, specs.blocks, specs.block_table, PartitionSpec(None, "x")),
            out_specs=(specs.blocks, *by_step),
        )
    )
    arguments = (q, blocks, local_table, rows)
    hlo = sharded.lower(*arguments).compile().as_text()
    assert not [name for name in COLLECTIVES if name in hlo]
    _, outs, lses = sharded(*arguments)
    for i in range(steps):
        assert_same((outs[i], lses[i]), attend_growing(rows, q, i + 1))


def test_decode_specs_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match=r"heads must name a mesh axis .* got None"):
        decode_specs(shard_kv_heads=True)
    with pytest.raises(ValueError, match="different mesh axes, got 'x' for both"):
        decode_specs(batch="x", heads="x")


# Ahead of time.


def layers(q: jax.Array, blocks: jax.Array, table: jax.Array, lengths: jax.Array) -> tuple:
    rows = jnp.ones((q.shape[0], 1, *blocks.shape[2:]), blocks.dtype)
    schedule = make_schedule(lengths, h_q=q.shape[2])
    blocks = append(blocks, rows, table, lengths - 1)
    return dense_decode(q, blocks, table, lengths, schedule=schedule)


def hopper_case() -> cases.DecodeInputs:
    return cases.make_inputs(cases.DecodeCase(2, 1, 70, 16))


def test_export_for_cpu_and_cuda_and_back() -> None:
    arguments = hopper_case().arguments
    exported = jax.export.export(
        jax.jit(layers), platforms=("cpu", "cuda"), disabled_checks=export_checks()
    )(*arguments)
    assert exported.platforms == ("cpu", "cuda")
    restored = jax.export.deserialize(exported.serialize())
    out, lse = jax.jit(restored.call)(*arguments)
    assert_same((out, lse), layers(*arguments))


def test_export_without_export_checks_is_refused() -> None:
    with pytest.raises(ValueError, match="flashmla"):
        jax.export.export(jax.jit(layers), platforms=("cpu",))(*hopper_case().arguments)


def test_export_of_a_sharded_function() -> None:
    mesh = jax.make_mesh((8,), ("y",), axis_types=(AxisType.Auto,), devices=jax.devices("cpu"))
    specs = decode_specs(heads="y")
    case = SMALL(2, 1, 40, 16)
    inputs = cases.make_inputs(case)
    arguments = [
        jax.device_put(x, NamedSharding(mesh, spec))
        for x, spec in zip(inputs.arguments, specs.in_specs, strict=True)
    ]
    sharded = jax.jit(
        jax.shard_map(decode, mesh=mesh, in_specs=specs.in_specs, out_specs=specs.out_specs)
    )
    exported = jax.export.export(sharded, disabled_checks=export_checks())(*arguments)
    restored = jax.export.deserialize(exported.serialize())
    assert_same(jax.jit(restored.call)(*arguments), cases.naive_decode(case, inputs))


def lowered(function: Callable, platform: str, *arguments: object) -> str:
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()


def test_lowering_for_cuda_without_a_gpu() -> None:
    text = lowered(layers, "cuda", *hopper_case().arguments)
    for target in _ffi.TARGETS.values():
        assert text.count(f"@{target}(") == 1
    assert "sm_scale = 0.0416666679 : f32" in text
    assert "causal = false" in text
    assert "output_operand_alias" in text


def test_lowering_for_cuda_of_dimensions_that_the_kernel_does_not_take() -> None:
    inputs = cases.make_inputs(SMALL(2, 1, 30, 4))
    _ffi._warn_once.cache_clear()
    message = "pure-JAX reference: the sm90 kernel takes d_qk = 576.* got d_qk = 24"
    with pytest.warns(RuntimeWarning, match=message):
        text = lowered(decode, "cuda", *inputs.arguments)
    assert "flashmla_dense_decode" not in text
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once only
        lowered(lambda *x: decode(*x, causal=True), "cuda", *inputs.arguments)
    message = r'dense_decode with implementation="kernel": the sm90 kernel takes'
    with pytest.raises(NotImplementedError, match=message):
        lowered(functools.partial(decode, implementation="kernel"), "cuda", *inputs.arguments)


def test_lowering_for_a_platform_without_kernels_is_the_reference() -> None:
    arguments = hopper_case().arguments
    assert "custom_call @flashmla" not in lowered(layers, "tpu", *arguments)
    message = 'implementation="kernel": there are kernels for cpu and cuda'
    with pytest.raises(NotImplementedError, match=message):
        lowered(functools.partial(dense_decode, implementation="kernel"), "tpu", *arguments)


def test_kernel_refusal() -> None:
    assert kernel_refusal("cpu", d_qk=7, d_v=5, block_size=3) is None
    assert "not for tpu" in kernel_refusal("tpu")
    assert "got d_qk = 512" in kernel_refusal("cuda", d_qk=512)


def run_python(script: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-P", "-c", script],  # the installed package, not the sources
        env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


COMPILE = """
import jax, jax.monitoring, numpy as np
events = []
jax.monitoring.register_event_listener(lambda name, **_: events.append(name))
import ml_dtypes
from jax_flashmla import dense_decode
q, blocks = np.ones((1, 1, 2, 24), ml_dtypes.bfloat16), np.ones((2, 8, 1, 24), ml_dtypes.bfloat16)
table, lengths = np.array([[0, 1]], np.int32), np.array([9], np.int32)
jax.jit(lambda *x: dense_decode(*x, d_v=16))(q, blocks, table, lengths)[0].block_until_ready()
print(events.count("/jax/compilation_cache/cache_hits"),
      events.count("/jax/compilation_cache/cache_misses"))
"""


def test_persistent_compilation_cache_hits_in_another_process(tmp_path: os.PathLike) -> None:
    environment = {
        "JAX_COMPILATION_CACHE_DIR": os.fspath(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    hits, misses = map(int, run_python(COMPILE, **environment).split())
    assert (hits, misses > 0) == (0, True)
    hits, misses = map(int, run_python(COMPILE, **environment).split())
    assert (hits > 0, misses) == (True, 0)


def test_import_initialises_no_backend() -> None:
    script = """
import jax, jax_flashmla
jax.config.update("jax_num_cpu_devices", 3)  # an error once there is a backend
print(len(jax.devices()))
"""
    assert run_python(script).split() == ["3"]


@pytest.mark.parametrize("implementation", ["kernel", "xla"])
def test_64_bit_mode_changes_nothing(implementation: str) -> None:
    inputs = cases.make_inputs(SMALL(3, 2, 40, 4))
    run = functools.partial(decode, *inputs.arguments, implementation=implementation)
    expected = run()
    with jax.enable_x64(True):
        got = run()
        schedule = make_schedule(inputs.cache_seqlens, h_q=4, implementation=implementation)
    assert [x.dtype for x in got] == [jnp.bfloat16, jnp.float32]
    assert schedule.cuts.dtype == jnp.int32
    np.testing.assert_array_equal(got[0], expected[0])
    np.testing.assert_array_equal(got[1], expected[1])
