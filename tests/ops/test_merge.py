"""merge_lse: attention over parts of the keys, merged, is attention over all of them."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cases
import naive
import tolerances
from jax_flashmla import dense_decode, merge_lse


def attend_parts(bounds: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Float32 attention of 2 x 3 rows over keys [bounds[i], bounds[i + 1]) for each i."""
    rng = np.random.default_rng(cases.SEED)
    q, keys = rng.standard_normal((2, 3, 16)), rng.standard_normal((bounds[-1], 1, 16))
    parts = [
        naive.dense(q, keys[low:high], high - low, d_v=8)
        for low, high in itertools.pairwise(bounds)
    ]
    outs, lses = zip(*parts, strict=True)
    return np.stack(outs).astype(np.float32), np.stack(lses).astype(np.float32)


def assert_merged(got: tuple, expected: tuple) -> None:
    tolerances.assert_decoded(got, expected, out=tolerances.MERGE, lse=tolerances.MERGE)


@settings(max_examples=30)
@given(st.lists(st.integers(0, 40), min_size=4, max_size=4))
def test_parts_merge_to_the_whole_empty_ones_included(cuts: list[int]) -> None:
    bounds = [0, *sorted(cuts), 41]
    (whole_out,), (whole_lse,) = attend_parts([0, 41])
    assert_merged(merge_lse(*attend_parts(bounds)), (whole_out, whole_lse))


def test_empty_part_has_no_influence_even_if_it_holds_nan() -> None:
    outs, lses = attend_parts([0, 20, 41])
    alone = merge_lse(outs, lses)
    outs = np.concatenate([outs, np.full_like(outs[:1], np.nan)])
    lses = np.concatenate([lses, np.full_like(lses[:1], -np.inf)])
    assert_merged(merge_lse(outs, lses), alone)


def test_nothing_at_all_is_zero_and_minus_infinity() -> None:
    out, lse = merge_lse(jnp.full((3, 2, 4), jnp.nan), jnp.full((3, 2), -jnp.inf))
    assert not np.asarray(out).any()
    assert np.isneginf(lse).all()


def test_one_part_is_itself() -> None:
    outs, lses = attend_parts([0, 41])
    out, lse = merge_lse(outs, lses)
    np.testing.assert_array_equal(out, outs[0])
    np.testing.assert_array_equal(lse, lses[0])


def test_far_apart_lses_do_not_overflow() -> None:
    out, lse = merge_lse(jnp.asarray([[1.0], [2.0]]), jnp.asarray([-1e4, 1e4]))
    np.testing.assert_array_equal(out, [2.0])
    np.testing.assert_array_equal(lse, 1e4)


def test_sequences_and_other_axes_give_the_same() -> None:
    outs, lses = attend_parts([0, 10, 30, 41])
    expected = merge_lse(outs, lses)
    from_sequence = merge_lse(list(outs), tuple(lses))
    from_axis = merge_lse(np.moveaxis(outs, 0, 2), np.moveaxis(lses, 0, 2), axis=2)
    for got in (from_sequence, from_axis, jax.jit(merge_lse)(outs, lses)):
        assert_merged(got, expected)


def test_keeps_the_dtype_of_outs() -> None:
    out, lse = merge_lse(jnp.ones((2, 3, 4), jnp.bfloat16), jnp.zeros((2, 3)))
    assert (out.dtype, lse.dtype) == (jnp.bfloat16, jnp.float32)
    tolerances.assert_close("out", out, np.ones((3, 4)), tolerances.OUT)


def test_merges_dense_decode_over_two_caches(implementation: str) -> None:
    """A sequence whose first 128 tokens are in one cache and the others in another."""
    case = cases.DecodeCase(3, 2, 300, 4, ragged=False)
    inputs = cases.make_inputs(case)
    expected_out, expected_lse = cases.naive_decode(case, inputs)
    parts = [
        dense_decode(
            inputs.q,
            inputs.blocks,
            np.ascontiguousarray(table),
            np.full(3, length, np.int32),
            implementation=implementation,
        )
        for table, length in (
            (inputs.block_table[:, :2], 128),
            (inputs.block_table[:, 2:], 300 - 128),
            (inputs.block_table, 0),
        )
    ]
    out, lse = merge_lse(*zip(*parts, strict=True))
    tolerances.assert_decoded((out, lse), (expected_out, expected_lse))


def test_gradient_is_finite_with_empty_parts() -> None:
    outs, lses = (jnp.asarray(x) for x in attend_parts([0, 0, 20, 41]))

    def total(outs: jax.Array, lses: jax.Array) -> jax.Array:
        out, lse = merge_lse(outs, lses)
        return jnp.sum(out**2) + jnp.sum(lse)

    gradients = jax.jit(jax.grad(total, argnums=(0, 1)))(outs, lses)
    for gradient in gradients:
        assert np.isfinite(gradient).all()
        assert not np.asarray(gradient[0]).any()
        assert np.asarray(gradient[1]).any()


@pytest.mark.parametrize(
    ("outs", "lses", "axis", "error", "message"),
    [
        (
            [],
            [],
            0,
            ValueError,
            r"outs must be at least one part, all of one shape, got shapes \[\]",
        ),
        (
            [np.ones((2, 4), np.float32), np.ones((3, 4), np.float32)],
            np.ones((2, 2), np.float32),
            0,
            ValueError,
            r"outs must be .* one shape, got shapes \[\(2, 4\), \(3, 4\)\]",
        ),
        (None, None, 0, TypeError, "outs must be an array .* or a list of them .*, got None"),
        (
            np.ones((0, 4), np.float32),
            np.ones(0, np.float32),
            0,
            ValueError,
            r"outs must have at least one part along axis 0, got shape \(0, 4\)",
        ),
        (
            np.ones((2, 4), np.float32),
            np.ones(2, np.float32),
            1,
            ValueError,
            r"axis of lses must be between 0 and 0, got 1",
        ),
        (
            np.ones((2, 4), np.float32),
            np.ones(2, np.float32),
            -1,
            ValueError,
            r"axis of outs must be between 0 and 1, got -1",
        ),
        (
            np.ones((2, 3, 4), np.float32),
            np.ones((2, 4), np.float32),
            0,
            ValueError,
            r"lses must have outs' shape less its last axis.*\(2, 3\), got \(2, 4\)",
        ),
        (
            np.ones((2, 4), np.int32),
            np.ones(2, np.float32),
            0,
            TypeError,
            "outs must have a floating dtype, got int32",
        ),
        (
            np.ones((2, 4), np.float32),
            np.ones(2, np.float16),
            0,
            TypeError,
            "lses must have dtype float32, got float16",
        ),
        (
            [np.ones((2, 4), np.float32), np.ones((2, 4), np.float16)],
            np.ones((2, 2), np.float32),
            0,
            ValueError,
            r"outs must be .* all of one dtype, got dtypes \['float16', 'float32'\]",
        ),
        (
            [[[1.0] * 4], [[1.0] * 4]],
            np.ones((2, 1), np.float32),
            0,
            TypeError,
            r"outs\[0\] must be an array \[...\], got .* of type list",
        ),
        (
            np.ma.masked_array(np.ones((2, 4), np.float32)),
            np.ones(2, np.float32),
            0,
            TypeError,
            "outs must be .* without a mask, got a masked array",
        ),
        (
            np.ones((2, 4), np.float32),
            np.ones(2, np.float32),
            0.0,
            TypeError,
            "axis of outs must be a Python int .*, got 0.0 of type float",
        ),
    ],
)
def test_wrong_calls(outs: object, lses: object, axis: int, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        merge_lse(outs, lses, axis=axis)
