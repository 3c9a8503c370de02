"""dense_decode over v32 and fp8_row caches on a Hopper GPU."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cases
import naive
import tolerances
from decode_groups import Group, assert_case, assert_close, coded, kernel, make_queries, make_rows
from jax_flashmla import CacheFormat, dense_decode, make_schedule
from stored import decode_inputs, dequantised, scale_of

pytestmark = pytest.mark.gpu
FORMATS = ("v32", "fp8_row")


def space() -> list[cases.DecodeCase]:
    """Of FlashMLA's space of one cache head a few cases with every pair of values."""
    fields = ("b", "s_q", "s_k", "h_q", "ragged", "causal")
    return cases.pairwise([case for case in cases.flashmla_cases() if case.h_kv == 1], fields)


@pytest.mark.parametrize("case", space(), ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_flashmlas_space(name: str, case: cases.DecodeCase) -> None:
    group = Group(case.s_k, 1, case.s_q, case.h_q, b=case.b, format=name)
    assert_case(group, case.ragged, case.causal, case.b)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("block_size", [8, 24, 64, 72, 256])
def test_against_float64_at_any_block_size(name: str, causal: bool, block_size: int) -> None:
    format = CacheFormat(name=name, block_size=block_size)
    q, blocks, table, lengths = decode_inputs(format, [350, 0, 77, 1], h_q=20, s_q=2)
    out, lse = kernel(
        *map(jnp.array, (q, blocks, table, lengths)),
        format=format,
        kv_scale=scale_of(format),
        causal=causal,
    )
    rows = dequantised(format, blocks)
    for i, length in enumerate(lengths):
        token = np.arange(length)
        keys = rows[table[i, token // block_size], token % block_size]
        expected = naive.dense(q[i], keys, int(length), d_v=512, causal=causal)
        tolerances.assert_decoded((out[i], lse[i]), expected)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(("s_q", "h_q"), [(1, 16), (1, 128), (2, 64), (4, 9), (1, 32)])
def test_zero_lengths_among_128_sequences(name: str, s_q: int, h_q: int, causal: bool) -> None:
    group = Group(4096, 1, s_q, h_q, b=128, zero_lengths=True, format=name)
    assert_case(group, True, causal, 128)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("tiles", ["wide", "few", "small", "invariant"])
@pytest.mark.parametrize(("s_q", "h_q"), [(1, 128), (1, 100), (2, 10), (4, 16)])
def test_schedules(tiles: str, s_q: int, h_q: int, name: str) -> None:
    """A schedule of few parts has tiles of 16 or 32 query rows, whatever the lengths then are."""
    group = Group(1000, 1, s_q, h_q, b=9, zero_lengths=True, format=name)
    arguments = group.arguments(True)
    schedule = make_schedule(
        arguments[-1],
        h_q=h_q,
        s_q=s_q,
        max_seqlen={"small": 64, "few": 1000}.get(tiles),
        format=CacheFormat(name=name),
        batch_invariant=tiles == "invariant",
    )
    rows = s_q * h_q
    expected_rows = {"small": 16, "few": 32 if rows > 32 else 64}.get(tiles, 64)
    assert schedule.tile_rows == expected_rows
    got = kernel(*arguments, causal=True, schedule=schedule, **group.options)
    assert_close(got, group.expected(True, True))


@pytest.mark.parametrize("name", FORMATS)
def test_a_batch_invariant_schedule_gives_the_same_bits_in_any_batch(name: str) -> None:
    group = Group(1000, 1, 1, 40, b=9, format=name)

    def run(*arguments: jax.Array) -> tuple[jax.Array, jax.Array]:
        schedule = make_schedule(arguments[-1], h_q=40, batch_invariant=True)
        return kernel(*arguments, schedule=schedule, **group.options)

    q, blocks, table, lengths = group.arguments(True)
    out, lse = run(q, blocks, table, lengths)
    for i in (0, 5):
        alone = run(q[i : i + 1], blocks, table[i : i + 1], lengths[i : i + 1])
        assert jnp.array_equal(alone[0][0], out[i])
        assert jnp.array_equal(alone[1][0], lse[i])


@pytest.mark.parametrize("name", FORMATS)
def test_packed_queries(name: str) -> None:
    """Of several tokens, of one, of none, and padding, against the reference."""
    group = Group(700, 1, 1, 16, b=5, format=name)
    _, blocks, table, lengths = group.arguments(False)
    cu_q_lens = np.array([0, 5, 6, 6, 40, 47], np.int32)
    q = make_queries(5, (50, 16, 576), "bfloat16").at[47:].set(jnp.nan)
    run = functools.partial(
        dense_decode, q, blocks, table, lengths, cu_q_lens=cu_q_lens, causal=True, **group.options
    )
    got = run(implementation="kernel")
    assert_close(got, run(implementation="xla"))
    assert not got[0][47:].any()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("h_q", [16, 64])
def test_block_ids_and_lengths_that_are_none(name: str, h_q: int) -> None:
    format = CacheFormat(name=name)
    blocks = coded(format, make_rows(2, (8, 64, 1, 576), "bfloat16"))
    table = np.array([[0, -1, 2], [8, 3, 2147480000], [-(2**31), 1, 4], [5, 6, 7]], np.int32)
    lengths = np.array([192, 2**31 - 1, 100, -7], np.int32)
    q = make_queries(1, (4, 1, h_q, 576), "bfloat16")
    run = functools.partial(
        dense_decode, q, blocks, table, lengths, format=format, kv_scale=scale_of(format)
    )
    assert_close(run(implementation="kernel"), run(implementation="xla"))


@pytest.mark.parametrize("h_q", [16, 64])
@pytest.mark.parametrize("scale", [-0.25, 3e-3, 1e4])
def test_kv_scale_may_be_any_number_and_traced(scale: float, h_q: int) -> None:
    group = Group(300, 1, 1, h_q, b=3, format="fp8_row")
    q, *arrays = group.arguments(True)
    run = jax.jit(dense_decode, static_argnames=("format", "implementation"))
    got, expected = (
        run(
            jnp.asarray(q) / 100,
            *arrays,
            format=group.options["format"],
            kv_scale=jnp.float32(scale),
            implementation=implementation,
        )
        for implementation in ("kernel", "xla")
    )
    outs = (np.asarray(x[0], np.float32) / abs(scale) for x in (got, expected))
    np.testing.assert_allclose(*outs, rtol=0.02, atol=0.2)  # codes are up to 448
    np.testing.assert_allclose(got[1], expected[1], rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("name", FORMATS)
def test_the_same_bits_over_200_reruns(name: str) -> None:
    group = Group(4096, 1, 1, 64, b=6, format=name)
    run = jax.jit(functools.partial(kernel, **group.options))
    first = run(*group.arguments(True))
    for _ in range(200):
        for x, again in zip(first, run(*group.arguments(True)), strict=True):
            assert jnp.array_equal(x, again)
