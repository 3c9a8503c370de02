"""index_topk against a stable sort: of the scores that index_scores gives, or of given ones."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import index_cases
from index_cases import IndexCase, Problem
from jax_flashmla import index_scores, index_topk, make_schedule


@pytest.fixture(scope="module", params=index_cases.index_cases(), ids=str)
def problem(request: pytest.FixtureRequest) -> Problem:
    return index_cases.make_problem(request.param)


@functools.cache
def small() -> Problem:
    return index_cases.make_problem(IndexCase(b=3, s_q=3, heads=9, layers=3, bad_ids=True))


def run(arguments: dict[str, Any], implementation: str | None, **changes: Any) -> tuple:
    return index_topk(
        **{**arguments, **changes}, return_positions=True, implementation=implementation
    )


def select(
    scores: Any, arguments: dict[str, Any], implementation: str | None, **changes: Any
) -> tuple:
    rest = {k: v for k, v in arguments.items() if k not in ("q", "weights", "blocks")}
    return run({**rest, "q": None, "weights": None, "blocks": None}, implementation,
               scores=scores, **changes)  # fmt: skip


def check(got: tuple, positions: np.ndarray, block_table: np.ndarray) -> None:
    assert [x.dtype for x in got] == [jnp.int32, jnp.int32]
    np.testing.assert_array_equal(got[1], positions)
    np.testing.assert_array_equal(got[0], index_cases.slots_of(positions, block_table))


def check_problem(made: Problem, implementation: str) -> None:
    """Computed and given scores alike, twice."""
    topk, arguments = made.case.topk, made.arguments
    scores = index_scores(**arguments, implementation=implementation)
    expected = index_cases.naive_topk(np.asarray(scores), made.visible, topk)
    for _ in range(2):
        got = run(arguments, implementation, topk=topk)
        check(got, expected, arguments["block_table"])
    given = np.where(made.visible, scores, np.inf)  # what is not visible may be anything
    options = {"topk": topk, "layer_blocks": made.case.layer_blocks}
    got = select(given, arguments, implementation, **options)
    check(got, expected, arguments["block_table"])
    if made.case.integers:  # then scores are exact
        exact = index_cases.naive_topk(made.expected, made.visible, topk)
        np.testing.assert_array_equal(got[1], exact)


def test_selects_what_a_stable_sort_does(problem: Problem, implementation: str) -> None:
    check_problem(problem, implementation)


@pytest.mark.gpu
@pytest.mark.parametrize("case", index_cases.hopper_cases(), ids=str)
def test_hopper_selects_what_a_stable_sort_does(case: IndexCase) -> None:
    with jax.default_device(jax.devices("cuda")[0]):
        check_problem(index_cases.make_problem(case), "kernel")


# On Hopper a sample of the row says where to look: what it makes of rows that are like no sample.
ROWS = {
    "normal": lambda i, z: z,
    "rising": lambda i, z: i,
    "falling": lambda i, z: -i,
    "equal": lambda i, z: 0 * z,
    "sampled are low": lambda i, z: z - 100 * (i % 16 == 0),
    "sampled are high": lambda i, z: z + 100 * (i % 16 == 0),
    "far out": lambda i, z: np.where(i % 1000 == 0, 3e38 * np.sign(z), z),
}


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize(
    ("b", "tokens", "topk"),
    [(1, 4096, 2048), (150, 8192, 512), (3, 32768, 2048), (2, 131072, 4096)],
)
def test_hopper_selects_from_rows_of_any_kind(b: int, tokens: int, topk: int, kind: str) -> None:
    z = np.random.default_rng(b).standard_normal((b, 1, tokens), np.float32)
    scores = ROWS[kind](np.arange(tokens), z).astype(np.float32) + np.zeros_like(z)
    table = np.arange(b * tokens // 64, dtype=np.int32).reshape(b, -1)
    expected = np.sort(np.argsort(-scores, axis=2, kind="stable")[:, :, :topk], axis=2)
    options: dict[str, Any] = {"format": None, "scores": scores, "topk": topk}
    with jax.default_device(jax.devices("cuda")[0]):
        indices, positions = index_topk(
            None, None, None, table, np.full(b, tokens, np.int32), return_positions=True, **options
        )
    np.testing.assert_array_equal(positions, expected)
    np.testing.assert_array_equal(indices, table[:, :1, None] * 64 + expected)


def test_indices_alone_are_returned_by_default(implementation: str) -> None:
    options = {"topk": 5, "implementation": implementation}
    indices = index_topk(**small().arguments, **options)
    np.testing.assert_array_equal(indices, run(small().arguments, implementation, topk=5)[0])


@pytest.mark.parametrize("num_parts", [1, 7, 256])
def test_any_schedule_selects_the_same(num_parts: int, kernel: str) -> None:
    expected = run(small().arguments, kernel, topk=50)
    scores = index_scores(**small().arguments, implementation=kernel)
    for lengths in (small().arguments["cache_seqlens"], np.array([900, 0, 1])):
        schedule = make_schedule(lengths, h_q=1, num_parts=num_parts)
        for got in (
            run(small().arguments, kernel, topk=50, schedule=schedule),
            select(scores, small().arguments, kernel, topk=50, schedule=schedule),
        ):
            for x, y in zip(got, expected, strict=True):
                np.testing.assert_array_equal(x, y)


def test_scores_that_are_no_numbers_are_not_selected(implementation: str) -> None:
    arguments, _ = index_cases.hostile()
    scores = np.asarray(index_scores(**arguments, implementation=implementation))
    visible = np.isfinite(scores) | np.isposinf(scores) | np.isneginf(scores)
    for topk in (50, 640):
        got = run(arguments, implementation, topk=topk)
        expected = index_cases.naive_topk(scores, visible, topk)
        check(got, expected, arguments["block_table"])


# Given scores: one program for all examples, what varies is data.
TOKENS = 4 * 64
SPECIAL = np.array(
    [
        *(0x0, 0x80000000, 0x1, 0x80000001, 0x3F800000, 0xBF800000, 0x7F7FFFFF),
        *(0x7F800000, 0xFF800000, 0x7F800001, 0x7FC00000, 0xFFFFFFFF),  # infinities, NaN
    ],
    np.uint32,
)


@functools.cache
def jitted(implementation: str, topk: int, causal: bool) -> Any:
    options = {"topk": topk, "causal": causal, "format": None, "layer_blocks": 7}
    return jax.jit(
        lambda scores, table, lengths: select(
            scores, {"block_table": table, "cache_seqlens": lengths}, implementation, **options
        )
    )


@st.composite
def some_scores(draw: st.DrawFn) -> np.ndarray:
    """[2, 2, TOKENS], of few values or of many, hostile ones among them."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = (2, 2, TOKENS)
    kind = draw(st.sampled_from(["special", "few", "normal", "bits", "same", "close"]))
    if kind == "special":
        return rng.choice(SPECIAL, shape).view(np.float32)
    if kind == "bits":
        return rng.integers(0, 2**32, shape, dtype=np.uint32).view(np.float32)
    if kind == "close":  # differ in their last bits alone
        return (0x3F800000 + rng.integers(0, 300, shape, dtype=np.uint32)).view(np.float32)
    few = draw(st.integers(1, 5))
    values = {"few": rng.integers(-few, few, shape), "same": np.full(shape, few)}
    scores = values.get(kind, rng.standard_normal(shape)).astype(np.float32)
    odd = rng.random(shape) < draw(st.sampled_from([0, 0.1, 0.9]))
    scores[odd] = rng.choice(SPECIAL, odd.sum()).view(np.float32)
    return scores


ANY = st.integers(-(2**31), 2**31 - 1)


@settings(max_examples=60)
@given(
    scores=some_scores(),
    ids=st.lists(st.integers(0, 6) | st.integers(-2, 8) | ANY, min_size=8, max_size=8),
    lengths=st.lists(st.integers(-1, TOKENS + 1) | ANY | st.just(TOKENS), min_size=2, max_size=2),
    options=st.sampled_from([(1, True), (37, False), (200, True)]),
)
@pytest.mark.usefixtures("on_cpu")
def test_selection_from_any_scores(
    scores: np.ndarray, ids: list[int], lengths: list[int], options: tuple[int, bool]
) -> None:
    topk, causal = options
    table = np.array(ids, np.int32).reshape(2, 4)
    cache_seqlens = np.array(lengths, np.int32)
    visible = index_cases.visible_tokens(table, cache_seqlens, 2, causal, 7)
    expected = index_cases.naive_topk(scores, visible, topk)
    for implementation in ("kernel", "xla"):
        arguments = map(jnp.asarray, (scores, table, cache_seqlens))
        check(jitted(implementation, topk, causal)(*arguments), expected, table)


@pytest.mark.parametrize("ties", [True, False])
def test_selection_from_a_long_row(ties: bool, implementation: str) -> None:
    rng = np.random.default_rng(3)
    scores = rng.integers(0, 3, (1, 1, 100032)) if ties else rng.standard_normal((1, 1, 100032))
    scores = scores.astype(np.float32)
    table = rng.permutation(1563)[None]
    arguments = {"block_table": table, "cache_seqlens": np.array([100001]), "format": None}
    expected = index_cases.naive_topk(scores, np.arange(100032)[None, None] < 100001, 2048)
    check(select(scores, arguments, implementation, topk=2048), expected, table)


@pytest.mark.usefixtures("on_cpu")
def test_cpu_takes_query_tokens_in_turns() -> None:
    """Scores of a long prefill would fill the memory: 2^24 of them are kept at a time."""
    made = index_cases.make_problem(IndexCase(b=1, s_q=33, heads=1, s_k=100))
    table = np.full((1, 20000), -1, np.int32)  # 10 query groups of 8 tokens would be too many
    table[0, -2:] = made.arguments["block_table"][0, :2]
    arguments = dict(made.arguments, block_table=table, cache_seqlens=[20000 * 64 - 28])
    got = run(arguments, "kernel", topk=30)
    short = run(made.arguments, "kernel", topk=30)
    np.testing.assert_array_equal(got[0], short[0])
    np.testing.assert_array_equal(got[1], np.where(short[1] < 0, -1, short[1] + 19998 * 64))


@pytest.mark.usefixtures("on_cpu")
def test_calls_of_different_shapes_one_after_the_other() -> None:
    """On the CPU's threads, which keep their working memory; hostile queries between."""
    other = index_cases.make_problem(IndexCase(b=1, s_q=2, heads=3, s_k=100, topk=9))
    problems = [(made, run(made.arguments, "kernel", topk=20)) for made in (small(), other)]
    bad = dict(small().arguments, weights=np.full((3, 3, 9), np.nan, np.float32))
    for _ in range(2):
        assert (np.asarray(run(bad, "kernel", topk=300)[0]) == -1).all()
        for made, expected in problems:
            for x, y in zip(run(made.arguments, "kernel", topk=20), expected, strict=True):
                np.testing.assert_array_equal(x, y)
