"""The operations under JAX's transformations, on the CPU's handlers."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cases
import tolerances
from jax_flashmla import cache_append, dense_decode, make_schedule
from jax_flashmla._num_parts import default_split

pytestmark = pytest.mark.usefixtures("on_cpu")

decode = functools.partial(dense_decode, d_v=cases.SMALL_D_V)


# Control flow.


def test_jit_eager_and_disabled_jit_agree() -> None:
    inputs = cases.make_inputs(cases.small(3, 2, 40, 4))
    eager = decode(*inputs.arguments)
    jitted = jax.jit(decode)(*inputs.arguments)
    with jax.disable_jit():
        unjitted = decode(*inputs.arguments)
    for got in (jitted, unjitted):
        np.testing.assert_array_equal(got[0], eager[0])
        np.testing.assert_array_equal(got[1], eager[1])


def test_fori_loop_appends_and_attends_each_step() -> None:
    steps = 19
    blocks, table, rows = cases.growing_cache(steps)
    q = cases.normal(np.random.default_rng(1), (2, 1, 3, 24), "bfloat16")

    @functools.partial(jax.jit, donate_argnums=0)
    def run(blocks: jax.Array, rows: jax.Array) -> tuple:
        def step(i: jax.Array, carry: tuple) -> tuple:
            blocks, outs, lses = carry
            positions = jnp.full(2, i, jnp.int32)
            blocks = cache_append(blocks, rows[i], table, positions)
            out, lse = decode(q, blocks, table, positions + 1)
            return blocks, outs.at[i].set(out), lses.at[i].set(lse)

        outs = jnp.zeros((steps, 2, 1, 3, cases.SMALL_D_V), jnp.bfloat16)
        return jax.lax.fori_loop(0, steps, step, (blocks, outs, jnp.zeros((steps, 2, 1, 3))))

    _, outs, lses = run(jnp.asarray(blocks), jnp.asarray(rows))
    for i in range(steps):
        tolerances.assert_decoded((outs[i], lses[i]), cases.attend_growing(rows, q, i + 1))


def test_scan_over_layers_with_a_stacked_cache() -> None:
    inputs = [cases.make_inputs(cases.small(2, 1, 30, h)) for h in (4, 4)]
    layers = jnp.stack([jnp.asarray(inputs[0].blocks), jnp.asarray(inputs[1].blocks) * 2])
    _, _, table, lengths = inputs[0].arguments
    q = jnp.asarray(inputs[0].q)

    @jax.jit
    def scanned(layers: jax.Array) -> tuple[jax.Array, jax.Array]:
        schedule = make_schedule(lengths, h_q=4)

        def layer(q: jax.Array, blocks: jax.Array) -> tuple:
            out, lse = decode(q, blocks, table, lengths, schedule=schedule)
            return jnp.pad(out, ((0, 0),) * 3 + ((0, 24 - cases.SMALL_D_V),)), (out, lse)

        return jax.lax.scan(layer, q, layers)[1]

    outs, lses = scanned(layers)
    first = decode(q, layers[0], table, lengths)
    second_q = jnp.pad(first[0], ((0, 0),) * 3 + ((0, 24 - cases.SMALL_D_V),))
    tolerances.assert_decoded((outs[0], lses[0]), first)
    tolerances.assert_decoded((outs[1], lses[1]), decode(second_q, layers[1], table, lengths))


# vmap.


def vmap_inputs(n: int = 3) -> tuple[np.ndarray, ...]:
    """n problems of one shape, their caches of equal size; ids out of range in some tables."""
    case = cases.small(2, 2, 30, 4, 2, ragged=False)
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
        tolerances.assert_decoded((outs[i], lses[i]), decode(*here, implementation="xla"))


@pytest.mark.parametrize("num_parts", [None, 5])
def test_vmap_of_small_problems_is_split_as_the_large_one_that_they_make(
    num_parts: int | None,
) -> None:
    n, h_q, max_blocks, block_size = 40, 128, 2, 64

    def one(q: jax.Array, blocks: jax.Array, table: jax.Array, lengths: jax.Array) -> tuple:
        schedule = make_schedule(lengths, h_q=h_q, num_parts=num_parts) if num_parts else None
        return decode(q, blocks, table, lengths, schedule=schedule)

    shapes = (
        jax.ShapeDtypeStruct((n, 1, 1, h_q, 24), jnp.bfloat16),
        jax.ShapeDtypeStruct((9, block_size, 1, 24), jnp.bfloat16),
        jax.ShapeDtypeStruct((n, 1, max_blocks), jnp.int32),
        jax.ShapeDtypeStruct((n, 1), jnp.int32),
    )
    jaxpr = str(jax.make_jaxpr(jax.vmap(one, in_axes=(0, None, 0, 0)))(*shapes))
    small, large = (
        default_split(b=b, s_q=1, h_q=h_q, h_kv=1, max_seqlen=max_blocks * block_size)
        for b in (1, n)
    )
    assert small.num_parts < large.num_parts
    assert (small.tile_rows, large.tile_rows) == (16, 64)
    found = re.findall(r"flashmla_make_schedule\[[^\]]*num_parts=(\d+)", jaxpr)
    assert found == [str(large.num_parts)]
    assert re.findall(r"tile_rows=(\d+)", jaxpr) == ["64"]


def test_vmap_over_nothing_but_the_schedule() -> None:
    inputs = cases.make_inputs(cases.small(2, 1, 30, 4))
    lengths = np.stack([inputs.cache_seqlens, np.array([1, 30], np.int32)])
    schedules = jax.vmap(functools.partial(make_schedule, h_q=4, num_parts=4))(lengths)
    assert schedules.cuts.shape == (2, 5, 2)
    for i in range(2):
        one = make_schedule(lengths[i], h_q=4, num_parts=4)
        np.testing.assert_array_equal(schedules.cuts[i], one.cuts)
    outs, lses = jax.vmap(lambda s: decode(*inputs.arguments, schedule=s))(schedules)
    expected = decode(*inputs.arguments)
    for i in range(2):
        tolerances.assert_decoded((outs[i], lses[i]), expected)


def test_nested_vmap() -> None:
    q, blocks, tables, lengths = vmap_inputs()
    qs = np.stack([q, q * 2])
    inner = jax.vmap(decode)
    outs, lses = jax.vmap(inner, in_axes=(0, None, None, None))(qs, blocks, tables, lengths)
    for j in range(2):
        for i in range(3):
            expected = decode(qs[j, i], blocks[i], tables[i], lengths[i], implementation="xla")
            tolerances.assert_decoded((outs[j, i], lses[j, i]), expected)


@pytest.mark.parametrize("axes", [(0, 0, 0, 0), (0, None, None, None), (None, 0, 0, 0)], ids=str)
def test_vmap_of_cache_append(axes: tuple) -> None:
    _, blocks, tables, _ = vmap_inputs()
    rows = cases.normal(np.random.default_rng(2), (3, 2, 5, 2, 24), "bfloat16")
    positions = np.array([[0, 7], [30, 3], [12, 28]], np.int32)  # some past the table's end
    arrays = (blocks, rows, tables, positions)
    arguments = [a[0] if axis is None else a for a, axis in zip(arrays, axes, strict=True)]
    got = jax.jit(jax.vmap(cache_append, in_axes=axes))(*arguments)
    for i in range(3):
        here = [a[0 if axis is None else i] for a, axis in zip(arrays, axes, strict=True)]
        np.testing.assert_array_equal(got[i], cache_append(*here))


def test_vmap_to_more_sequences_than_a_schedule_holds() -> None:
    q = jnp.zeros((4000, 5, 1, 1, 24), jnp.bfloat16)
    blocks, table, _ = cases.growing_cache(8, b=5)
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
    inputs = cases.make_inputs(cases.small(2, 2, 30, 4))
    q = jnp.asarray(inputs.q)
    function = functools.partial(squares, inputs=inputs, implementation=None)
    if transform == "append":
        _, table, rows = cases.growing_cache(8)
        blocks = jnp.zeros((2, 8, 1, 24), jnp.bfloat16)
        position = jnp.zeros(2, jnp.int32)

        def function(x: jax.Array) -> jax.Array:
            return cache_append(blocks, x, table, position).sum().astype(jnp.float32)

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
    inputs = cases.make_inputs(cases.small(3, 2, 30, 4, zero_lengths=True))
    blocks = jnp.asarray(inputs.blocks)

    def total(q: jax.Array, blocks: jax.Array) -> jax.Array:
        arguments = (q, blocks, *inputs.arguments[2:])
        out, lse = decode(*arguments, causal=True, implementation="xla")
        return jnp.sum(out.astype(jnp.float32)) + jnp.sum(jnp.where(lse == -jnp.inf, 0, lse))

    gradients = jax.jit(jax.grad(total, argnums=(0, 1)))
    grad_q, grad_blocks = gradients(jnp.asarray(inputs.q), blocks)
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

    gradient = jax.jit(jax.grad(one_lse))(jnp.asarray(inputs.q))[i, 1, head]
    expected = weights @ keys / weights.sum() * 24**-0.5
    tolerances.assert_close("gradient", gradient, expected, tolerances.GRADIENT)


def test_gradient_of_what_only_passes_by_is_allowed() -> None:
    inputs = cases.make_inputs(cases.small(2, 1, 30, 4))

    def loss(x: jax.Array) -> jax.Array:
        out, _ = decode(*inputs.arguments)
        return jnp.sum(out.astype(jnp.float32)) * x

    out, _ = decode(*inputs.arguments)
    np.testing.assert_allclose(jax.grad(loss)(2.0), np.asarray(out, np.float32).sum(), rtol=1e-5)


@pytest.mark.parametrize("implementation", ["kernel", "xla"])
def test_64_bit_mode_changes_nothing(implementation: str) -> None:
    inputs = cases.make_inputs(cases.small(3, 2, 40, 4))
    run = functools.partial(decode, *inputs.arguments, implementation=implementation)
    expected = run()
    with jax.enable_x64(True):
        got = run()
        schedule = make_schedule(inputs.cache_seqlens, h_q=4, implementation=implementation)
    assert [x.dtype for x in got] == [jnp.bfloat16, jnp.float32]
    assert schedule.cuts.dtype == jnp.int32
    np.testing.assert_array_equal(got[0], expected[0])
    np.testing.assert_array_equal(got[1], expected[1])
