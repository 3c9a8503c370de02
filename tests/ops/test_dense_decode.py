"""dense_decode against attention computed naively in float64, on every implementation."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import cases
import naive
import tolerances
from cases import DecodeCase
from jax_flashmla import dense_decode, kernel_refusal, make_schedule


@dataclasses.dataclass(frozen=True)
class Problem:
    case: DecodeCase
    inputs: cases.DecodeInputs
    out: np.ndarray
    lse: np.ndarray


@pytest.fixture(scope="module", params=cases.cpu_cases(), ids=str)
def problem(request: pytest.FixtureRequest) -> Problem:
    inputs = cases.make_inputs(request.param)
    return Problem(request.param, inputs, *cases.naive_decode(request.param, inputs))


def test_matches_naive_attention(
    problem: Problem, implementation: str, request: pytest.FixtureRequest
) -> None:
    case = problem.case
    is_gpu = request.node.get_closest_marker("gpu") is not None
    dimensions = {"d_qk": case.d_qk, "d_v": case.d_v, "block_size": case.block_size}
    if is_gpu and (refusal := kernel_refusal("cuda", **dimensions, dtype=case.dtype)):
        pytest.skip(refusal)
    run = functools.partial(
        dense_decode,
        *problem.inputs.arguments,
        d_v=case.d_v,
        causal=case.causal,
        implementation=implementation,
    )
    out, lse = run()
    assert out.dtype == case.dtype
    assert lse.dtype == jnp.float32
    bounds = tolerances.F32_DECODE if case.dtype == "float32" else {}
    tolerances.assert_decoded((out, lse), (problem.out, problem.lse), **bounds)

    again = run()
    np.testing.assert_array_equal(bits(out), bits(again[0]))
    np.testing.assert_array_equal(bits(lse), bits(again[1]))


def bits(x: jax.Array) -> np.ndarray:
    return np.asarray(x).view(np.uint16 if x.dtype.itemsize == 2 else np.uint32)


def test_scale_and_default_scale(implementation: str) -> None:
    inputs = cases.make_inputs(DecodeCase(5, 2, 200, 6))
    decode = functools.partial(dense_decode, *inputs.arguments, implementation=implementation)
    default, given = decode(), decode(sm_scale=576**-0.5)
    np.testing.assert_array_equal(bits(default[0]), bits(given[0]))
    out, lse = decode(sm_scale=0.2)
    for i in range(5):
        expected = naive.dense(
            inputs.q[i],
            inputs.keys[i],
            int(inputs.cache_seqlens[i]),
            d_v=512,
            sm_scale=0.2,
        )
        tolerances.assert_decoded((out[i], lse[i]), expected)


@pytest.mark.parametrize("num_parts", [1, 2, 3, 7, 64, 256])
def test_any_number_of_parts_gives_the_same_result(num_parts: int, kernel: str) -> None:
    case = DecodeCase(4, 1, 900, 3, causal=True)
    inputs = cases.make_inputs(case)
    expected = cases.naive_decode(case, inputs)
    schedule = make_schedule(
        inputs.cache_seqlens, h_q=3, num_parts=num_parts, implementation=kernel
    )
    out, lse = dense_decode(
        *inputs.arguments, causal=True, schedule=schedule, implementation=kernel
    )
    tolerances.assert_decoded((out, lse), expected)


@pytest.mark.parametrize("pieces", [33, 64, 65])
def test_many_pieces_of_many_rows_merge_to_the_whole(pieces: int, kernel: str) -> None:
    """On both sides of what a warp of the Hopper merge can weigh (kWarpPieces in csrc/sm90)."""
    case = DecodeCase(2, 1, 64 * pieces, 128, ragged=False)
    inputs = cases.make_inputs(case)
    schedule = make_schedule(
        inputs.cache_seqlens, h_q=128, num_parts=2 * pieces, implementation=kernel
    )
    assert (np.diff(np.asarray(schedule.cuts[:-1, 1])) != 0).all()  # one tile a part
    got = dense_decode(*inputs.arguments, schedule=schedule, implementation=kernel)
    tolerances.assert_decoded(got, cases.naive_decode(case, inputs))


@pytest.mark.parametrize("power", [-80, 0, 100])
def test_values_of_any_size_survive_the_merge(power: int, kernel: str) -> None:
    """Scaling the cache by a power of two, and the queries by its inverse, scales the result."""
    case = DecodeCase(2, 1, 900, 3)
    inputs = cases.make_inputs(case)
    out, lse = cases.naive_decode(case, inputs)
    q, blocks, *rest = inputs.arguments
    got, got_lse = dense_decode(
        jnp.ldexp(q.astype(jnp.float32), -power).astype(q.dtype),
        jnp.ldexp(blocks.astype(jnp.float32), power).astype(blocks.dtype),
        *rest,
        schedule=make_schedule(rest[-1], h_q=3, num_parts=9, implementation=kernel),
        implementation=kernel,
    )
    got = jnp.ldexp(got.astype(jnp.float32), -power).astype(got.dtype)
    tolerances.assert_decoded((got, got_lse), (out, lse))


@pytest.mark.parametrize("was", [[900, 1, 0, 64], [0, 0, 0, 0], [1, 2000, 128, 65]])
def test_schedule_of_other_lengths_gives_the_same_result(was: list[int], kernel: str) -> None:
    case = DecodeCase(4, 1, 900, 3)
    inputs = cases.make_inputs(case)
    expected = cases.naive_decode(case, inputs)
    schedule = make_schedule(jnp.asarray(was, jnp.int32), h_q=3, num_parts=9, implementation=kernel)
    out, lse = dense_decode(*inputs.arguments, schedule=schedule, implementation=kernel)
    tolerances.assert_decoded((out, lse), expected)


def test_batch_invariant_schedule_gives_a_sequence_the_same_bits_in_any_batch(kernel: str) -> None:
    inputs = cases.make_inputs(DecodeCase(9, 2, 3000, 9, causal=True))

    def decode(some: list[int], batch_invariant: bool) -> list[np.ndarray]:
        q, blocks, table, lengths = inputs.arguments
        schedule = make_schedule(
            jnp.asarray(lengths[some]), h_q=9, s_q=2, num_parts=8, batch_invariant=batch_invariant
        )
        results = dense_decode(
            q[some], blocks, table[some], lengths[some], causal=True, schedule=schedule,
            implementation=kernel,
        )  # fmt: skip
        return [bits(x) for x in results]

    together, longest = decode(list(range(9)), True), int(np.argmax(inputs.cache_seqlens))
    for some in [longest], [3, longest], [longest, 5, 1, 0, 8]:
        for x, y in zip(decode(some, True), together, strict=True):
            np.testing.assert_array_equal(x, y[some])
    cut = decode([longest], False)
    assert any((x[0] != y[longest]).any() for x, y in zip(cut, together, strict=True))


def test_row_with_nothing_to_attend_is_zero_and_minus_infinity(implementation: str) -> None:
    case = DecodeCase(3, 4, 64, 2, causal=True)
    inputs = cases.make_inputs(case)
    lengths = jnp.asarray([0, 2, 4], jnp.int32)
    out, lse = dense_decode(
        *inputs.arguments[:3], lengths, causal=True, implementation=implementation
    )
    seen = np.maximum(0, np.asarray(lengths)[:, None] - np.arange(3, -1, -1)[None, :])
    np.testing.assert_array_equal(np.isneginf(lse).all(axis=-1), seen == 0)
    assert not np.asarray(out, np.float32)[seen == 0].any()
    assert np.asarray(out, np.float32)[seen > 0].any(axis=(-1, -2)).all()


def test_out_of_range_blocks_read_as_zeros(implementation: str) -> None:
    case = DecodeCase(2, 1, 200, 4, ragged=False)
    inputs = cases.make_inputs(case)
    table, keys = inputs.block_table.copy(), inputs.keys.copy()
    num_blocks = inputs.blocks.shape[0]
    for (i, block), bad in {
        (0, 0): -1,
        (0, 2): num_blocks,
        (1, 1): 2**31 - 1,
        (1, 3): -(2**31),
    }.items():
        table[i, block] = bad
        keys[i, 64 * block : 64 * block + 64] = 0
    out, lse = dense_decode(
        inputs.q, inputs.blocks, table, inputs.cache_seqlens, implementation=implementation
    )
    for i in range(2):
        expected = naive.dense(inputs.q[i], keys[i], 200, d_v=512)
        tolerances.assert_decoded((out[i], lse[i]), expected)


def test_lengths_are_clamped_to_the_table(implementation: str) -> None:
    rng = np.random.default_rng(cases.SEED)
    blocks = jnp.asarray(rng.standard_normal((6, 64, 1, 576)), ml_dtypes.bfloat16)
    q = jnp.asarray(rng.standard_normal((3, 1, 2, 576)), ml_dtypes.bfloat16)
    table = jnp.asarray([[0, 1], [2, 3], [4, 5]], jnp.int32)
    decode = functools.partial(dense_decode, q, blocks, table, implementation=implementation)
    hostile = decode(jnp.asarray([2**31 - 1, -(2**31), 129], jnp.int32))
    clamped = decode(jnp.asarray([128, 0, 128], jnp.int32))
    tolerances.assert_decoded(hostile, clamped)
    assert np.isneginf(hostile[1][1]).all()
