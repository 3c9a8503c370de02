"""dense_decode on a Hopper GPU: the space that FlashMLA's tests sweep, and graph replay.

A quarter of that space, or with TEST_SPACE=whole in the environment all of it.
"""

from __future__ import annotations

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cases
import naive
import tolerances
from decode_groups import (
    Group,
    assert_case,
    assert_close,
    kernel,
    make_queries,
    make_rows,
    reference,
)
from jax_flashmla import cache_append, dense_decode, make_schedule

pytestmark = pytest.mark.gpu


WHOLE = os.environ.get("TEST_SPACE") == "whole"


@functools.lru_cache(maxsize=1)
def group_of(s_k: int, h_kv: int, s_q: int, h_q: int) -> Group:
    return Group(s_k, h_kv, s_q, h_q)


@pytest.mark.parametrize(
    "case", cases.flashmla_cases() if WHOLE else cases.flashmla_quarter(), ids=str
)
def test_flashmlas_space(case: cases.DecodeCase) -> None:
    group = group_of(case.s_k, case.h_kv, case.s_q, case.h_q)
    assert_case(group, case.ragged, case.causal, case.b)


def some_groups() -> list[cases.DecodeCase]:
    alike = [case for case in cases.flashmla_cases() if case.b == 2 and case.ragged and case.causal]
    return cases.pairwise(alike, ("s_q", "s_k", "h_q", "h_kv"))


@pytest.mark.parametrize("case", some_groups(), ids=str)
def test_flashmlas_space_against_float64(case: cases.DecodeCase) -> None:
    """One sequence against attention computed naively on the host."""
    group = group_of(case.s_k, case.h_kv, case.s_q, case.h_q)
    q, blocks, table, lengths = group.arguments(True, 2)
    out, lse = kernel(q, blocks, table, lengths, causal=True)
    length = int(lengths[1])
    keys = np.asarray(blocks[table[1, : -(-length // 64)]]).reshape(-1, *blocks.shape[2:])
    expected = naive.dense(np.asarray(q[1]), keys, length, d_v=512, causal=True)
    tolerances.assert_decoded((out[1], lse[1]), expected)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(("s_q", "h_q"), [(1, 128), (2, 64), (4, 9)])
def test_zero_lengths_among_128_sequences(s_q: int, h_q: int, causal: bool) -> None:
    group = Group(4096, 1, s_q, h_q, b=128, zero_lengths=True)
    assert_case(group, True, causal, 128)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(
    ("h_kv", "s_q", "h_q"),
    [(1, 1, 128), (1, 1, 100), (1, 2, 10), (1, 4, 16), (2, 2, 64), (4, 3, 80)],
)
@pytest.mark.parametrize("tiles", ["wide", "small"])
def test_tiles_that_fit_the_parts(tiles: str, h_kv: int, s_q: int, h_q: int, causal: bool) -> None:
    """A schedule of few parts has tiles of 16 query rows, whatever the lengths then are."""
    group = Group(1000, h_kv, s_q, h_q, b=9, zero_lengths=True)
    arguments = group.arguments(True)
    schedule = make_schedule(
        arguments[-1], h_q=h_q, h_kv=h_kv, s_q=s_q, max_seqlen=64 if tiles == "small" else None
    )
    got = kernel(*arguments, causal=causal, schedule=schedule)
    assert_close(got, group.expected(True, causal))


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(("h_kv", "s_q", "h_q"), [(1, 1, 16), (1, 2, 128), (8, 1, 64), (3, 4, 9)])
def test_float16(h_kv: int, s_q: int, h_q: int, causal: bool) -> None:
    assert_case(Group(4096, h_kv, s_q, h_q, dtype="float16"), True, causal, 64)


def test_one_huge_sequence_among_small_ones() -> None:
    lengths = np.full(33, 50, np.int32)
    lengths[17] = 200_000
    table, num_blocks = cases.make_table(lengths, 64, 3125)
    blocks = make_rows(2, (num_blocks, 64, 1, 576), "bfloat16")
    arguments = (make_queries(1, (33, 1, 16, 576), "bfloat16"), blocks, table, lengths)
    got = kernel(*arguments)
    alone = [x[17:18] for x in (arguments[0], table, lengths)]
    assert_close([x[17:18] for x in got], reference(alone[0], blocks, *alone[1:]))
    small = np.delete(np.arange(33), 17)
    arguments = (arguments[0][small], blocks, table[small, :1], lengths[small])
    assert_close([x[small] for x in got], reference(*arguments))


@pytest.mark.parametrize("h_q", [16, 32, 128])
def test_many_sequences_most_of_them_empty(h_q: int) -> None:
    """A block passes over many pieces without a tile, and its warpgroups must keep together."""
    lengths = np.zeros(3000, np.int32)
    lengths[40::70] = 3 * np.arange(40, 3000, 70) % 1000
    table, num_blocks = cases.make_table(lengths, 64, 16)
    blocks = make_rows(2, (num_blocks, 64, 1, 576), "bfloat16")
    q = make_queries(1, (3000, 1, h_q, 576), "bfloat16")
    out, lse = kernel(q, blocks, table, lengths)
    some = np.flatnonzero(lengths)
    assert_close((out[some], lse[some]), reference(q[some], blocks, table[some], lengths[some]))
    assert not out[lengths == 0].any()
    assert (lse[lengths == 0] == -jnp.inf).all()


def test_cache_of_more_than_2_to_the_31_elements() -> None:
    num_blocks = 2**31 // (64 * 576) + 100
    blocks = jnp.zeros((num_blocks, 64, 1, 576), jnp.bfloat16)
    assert blocks.size > 2**31
    ids = np.array([[num_blocks - 1, 0, num_blocks - 50], [5, num_blocks - 2, 7]], np.int32)
    lengths = np.array([192, 130], np.int32)
    rows = make_rows(3, (2, 192, 1, 576), "bfloat16")
    positions = np.zeros(2, np.int32)
    append = functools.partial(cache_append, implementation="kernel")
    blocks = jax.jit(append, donate_argnums=0)(blocks, rows, ids, positions)
    written = np.asarray(blocks[ids.reshape(-1)]).reshape(2, 192, 1, 576)
    np.testing.assert_array_equal(written, np.asarray(rows))
    q = make_queries(4, (2, 1, 16, 576), "bfloat16")
    out, lse = kernel(q, blocks, ids, lengths)
    for i in range(2):
        expected = naive.dense(np.asarray(q[i]), written[i], int(lengths[i]), d_v=512)
        tolerances.assert_decoded((out[i], lse[i]), expected)


LAYERS = 8  # more than the 5 nodes from which XLA records a CUDA graph


@pytest.mark.parametrize("options", [{}, {"xla_gpu_graph_min_graph_size": 1}], ids=str)
@pytest.mark.parametrize("loop", ["unrolled", "scan"])
def test_graph_replay_with_changed_lengths(loop: str, options: dict) -> None:
    """One compiled step of several layers, run again as its sequences grow, shrink and end."""
    b, h_q, max_blocks = 5, 16, 40
    table = np.random.default_rng(cases.SEED).permutation(b * max_blocks).astype(np.int32)
    table = table.reshape(b, max_blocks)
    blocks = make_rows(2, (LAYERS, b * max_blocks, 64, 1, 576), "bfloat16")
    q = make_queries(1, (LAYERS, b, 1, h_q, 576), "bfloat16")
    rows = make_rows(3, (LAYERS, b, 1, 1, 576), "bfloat16")

    def step(blocks: jax.Array, lengths: jax.Array, implementation: str) -> tuple:
        """Appends a token to each sequence in each layer, and attends."""
        schedule = make_schedule(lengths, h_q=h_q, implementation=implementation)

        def layer(_: None, x: tuple) -> tuple:
            q, blocks, rows = x
            blocks = cache_append(blocks, rows, table, lengths - 1, implementation=implementation)
            out, lse = dense_decode(
                q, blocks, table, lengths, schedule=schedule, implementation=implementation
            )
            return None, (blocks, out, lse)

        if loop == "scan":
            return jax.lax.scan(layer, None, (q, blocks, rows))[1]
        results = [layer(None, (q[i], blocks[i], rows[i]))[1] for i in range(LAYERS)]
        return tuple(map(jnp.stack, zip(*results, strict=True)))

    run = jax.jit(
        functools.partial(step, implementation="kernel"),
        donate_argnums=0,
        compiler_options=options,
    )
    check = jax.jit(functools.partial(step, implementation="xla"))
    expected_blocks = blocks.copy()
    for lengths in (
        [1, 1, 1, 1, 1],
        [63, 64, 65, 128, 129],
        [64, 65, 66, 129, 130],
        [2560, 1, 0, 700, 2000],
        [0, 0, 0, 0, 0],
        [5, 2560, 2559, 64, 1],
        [2560, 2560, 2560, 2560, 2560],
        [63, 64, 65, 128, 129],
    ):
        lengths = np.asarray(lengths, np.int32)
        blocks, *got = run(blocks, lengths)
        expected_blocks, *expected = check(expected_blocks, lengths)
        assert_close(got, expected)
        assert jnp.array_equal(blocks, expected_blocks)


def test_schedule_made_once_serves_growing_lengths() -> None:
    group = Group(4096, 1, 1, 128)
    q, blocks, table, lengths = group.arguments(True)
    schedule = make_schedule(np.maximum(lengths // 3, 1), h_q=128, implementation="kernel")
    assert_close(kernel(q, blocks, table, lengths, schedule=schedule), group.expected(True, False))


def test_schedule_equals_the_references() -> None:
    rng = np.random.default_rng(cases.SEED)
    for b, high in ((1, 100), (7, 5000), (128, 40000), (4096, 300), (16384, 40000)):
        lengths = rng.integers(0, high, b).astype(np.int32)
        kernels, references = (
            make_schedule(lengths, h_q=128, implementation=name) for name in ("kernel", "xla")
        )
        np.testing.assert_array_equal(kernels.cuts, references.cuts)


def test_vmap_is_one_call_of_a_longer_batch() -> None:
    group = Group(140, 1, 2, 16)
    q, blocks, table, lengths = group.arguments(True)
    split = [x.reshape(4, 16, *x.shape[1:]) for x in (q, table, lengths)]
    mapped = jax.jit(jax.vmap(kernel, in_axes=(0, None, 0, 0)))
    out, lse = mapped(split[0], blocks, *split[1:])
    flat = (out.reshape(64, 2, 16, 512), lse.reshape(64, 2, 16))
    assert_close(flat, group.expected(True, False))


def test_other_dimensions_run_the_reference_with_a_warning() -> None:
    case = cases.DecodeCase(2, 1, 100, 4, d_qk=320, d_v=256)
    inputs = cases.make_inputs(case)
    with pytest.warns(RuntimeWarning, match="the sm90 kernel takes .* got d_qk = 320, d_v = 256"):
        out, lse = dense_decode(*inputs.arguments, d_v=256)
    expected = cases.naive_decode(case, inputs)
    tolerances.assert_decoded((out, lse), expected)
    with pytest.raises(NotImplementedError, match="got d_qk = 320, d_v = 256"):
        kernel(*inputs.arguments, d_v=256)
