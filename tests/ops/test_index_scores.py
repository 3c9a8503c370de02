"""index_scores against scores computed naively from the keys as they are stored."""

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
import tolerances
from index_cases import E4M3, FORMAT, IndexCase, Problem
from jax_flashmla import index_scores, make_schedule, quantise
from jax_flashmla.reference import indexer


@pytest.fixture(scope="module", params=index_cases.index_cases(), ids=str)
def problem(request: pytest.FixtureRequest) -> Problem:
    return index_cases.make_problem(request.param)


@functools.cache
def small() -> Problem:
    return index_cases.make_problem(IndexCase(b=3, s_q=3, heads=9, layers=3, bad_ids=True))


def run(arguments: dict[str, Any], implementation: str | None, **changes: Any) -> jax.Array:
    return index_scores(**{**arguments, **changes}, implementation=implementation)


def bits(x: jax.Array) -> np.ndarray:
    return np.asarray(x).view(np.uint32)


def check(got: jax.Array, expected: np.ndarray, *, on_gpu: bool = False) -> None:
    bound = tolerances.INDEX_SCORES if on_gpu else tolerances.F32_INDEX_SCORES
    tolerances.assert_close("scores", np.asarray(got), expected, bound)


def test_matches_naive_scores(
    problem: Problem, implementation: str, request: pytest.FixtureRequest
) -> None:
    on_gpu = request.node.get_closest_marker("gpu") is not None
    got = run(problem.arguments, implementation)
    assert got.dtype == jnp.float32
    check(got, problem.expected, on_gpu=on_gpu)
    if problem.case.integers:
        np.testing.assert_array_equal(got, problem.expected.astype(np.float32))
    np.testing.assert_array_equal(bits(got), bits(run(problem.arguments, implementation)))


@pytest.mark.gpu
@pytest.mark.parametrize("case", index_cases.hopper_cases(), ids=str)
def test_hopper_matches_naive_scores(case: IndexCase) -> None:
    made = index_cases.make_problem(case)
    with jax.default_device(jax.devices("cuda")[0]):
        got, again = run(made.arguments, "kernel"), run(made.arguments, "kernel")
    check(got, made.expected, on_gpu=True)
    np.testing.assert_array_equal(bits(got), bits(again))


@pytest.mark.parametrize("num_parts", [1, 7, 256])
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_any_schedule_gives_the_same_bits(
    num_parts: int, batch_invariant: bool, kernel: str
) -> None:
    for lengths in (small().arguments["cache_seqlens"], np.array([900, 0, 1])):
        schedule = make_schedule(
            lengths, h_q=1, num_parts=num_parts, batch_invariant=batch_invariant
        )
        got = run(small().arguments, kernel, schedule=schedule)
        np.testing.assert_array_equal(bits(got), bits(run(small().arguments, kernel)))


def test_layers_of_one_array_by_a_traced_first_block(implementation: str) -> None:
    case = small().case
    arguments = {k: v for k, v in small().arguments.items() if k != "first_block"}
    arguments["blocks"] = arguments["blocks"][: 2 * case.layer_blocks]  # so that it is the last
    score = jax.jit(lambda first: run(arguments, implementation, first_block=first))
    for first in (case.first_block, case.first_block + 1, 2**31 - 1):
        np.testing.assert_allclose(
            score(jnp.int32(first)), small().expected.astype(np.float32), rtol=1e-2, atol=2e-3
        )


def test_keys_that_are_no_numbers_spoil_their_own_scores_only(implementation: str) -> None:
    arguments, expected = index_cases.hostile()
    got = np.asarray(run(arguments, implementation))
    np.testing.assert_array_equal(np.isnan(got), np.isnan(expected))
    huge = np.abs(expected) > 1e30  # relative errors alone
    for where, bound in ((~huge & ~np.isnan(expected), 0.05), (huge, 0)):
        np.testing.assert_allclose(got[where], expected[where], rtol=5e-2, atol=bound)


@pytest.mark.parametrize("name", ["q", "weights"])
def test_a_query_that_is_no_number_spoils_its_own_scores_only(
    name: str, implementation: str
) -> None:
    arguments = dict(small().arguments)
    arguments[name] = arguments[name].copy()
    arguments[name][0, 1] = np.nan
    got = np.asarray(run(arguments, implementation))
    visible = small().visible
    assert np.isnan(got[0, 1][visible[0, 1]]).all()
    np.testing.assert_array_equal(got[~visible], -np.inf)
    others = np.ones(got.shape[:2], bool)
    others[0, 1] = False
    np.testing.assert_array_equal(
        got[others], np.asarray(run(small().arguments, implementation))[others]
    )


def test_quantisation_costs_less_than_a_thousandth(implementation: str) -> None:
    """Of queries and keys that are quantised against those that are not."""
    rng = np.random.default_rng(1)
    q, keys = rng.standard_normal((1, 3, 32, 128)), rng.standard_normal((256, 128))
    keys *= np.exp2(rng.integers(-4, 4, (256, 1)))
    weights = rng.standard_normal((1, 3, 32)) / (32 * 128) ** 0.5
    q_scale = np.abs(q).max(axis=-1) / 448
    codes, scales = quantise(FORMAT, jnp.asarray(keys, jnp.float32))
    blocks = np.concatenate([x.reshape(4, -1) for x in map(np.asarray, (codes, scales))], axis=1)
    got = index_scores(
        (q / q_scale[..., None]).astype(np.float32).astype(E4M3),
        (weights * q_scale).astype(np.float32),
        blocks,
        np.arange(4)[None],
        [256],
        format=FORMAT,
        causal=False,
        implementation=implementation,
    )
    expected = index_cases.naive_scores(q, weights, keys[None], np.ones((1, 256)))
    x = np.asarray(got, np.float64)
    assert 1 - 2 * np.sum(x * expected) / np.sum(x**2 + expected**2) < 1e-3


ANY = st.integers(-(2**31), 2**31 - 1) | st.integers(-3, 400)


@functools.cache
def jitted(implementation: str) -> Any:
    rng = np.random.default_rng(2)
    q, weights, codes, scales = index_cases.make_numbers(rng, IndexCase(s_q=2, heads=3), 5 * 64)
    planes = [x[0].view(np.uint8).reshape(5, -1) for x in (codes, scales)]
    fixed = {"q": q, "weights": weights, "blocks": np.concatenate(planes, axis=1)}
    rest = {"format": FORMAT, "layer_blocks": 3, "causal": True}
    return jax.jit(lambda data: run({**fixed, **rest, **data}, implementation)), (
        q,
        weights,
        codes,
        scales,
    )


@settings(max_examples=50)
@given(
    ids=st.lists(ANY | st.integers(0, 2), min_size=8, max_size=8),
    lengths=st.lists(ANY, min_size=2, max_size=2),
    first_block=ANY,
)
@pytest.mark.usefixtures("on_cpu")
def test_any_ids_lengths_and_layer(ids: list[int], lengths: list[int], first_block: int) -> None:
    data = {
        "block_table": np.array(ids, np.int32).reshape(2, 4),
        "cache_seqlens": np.array(lengths, np.int32),
        "first_block": np.int32(first_block),
    }
    data = {k: jnp.asarray(v) for k, v in data.items()}
    score, (q, weights, codes, scales) = jitted("kernel")
    got = np.asarray(score(data))
    np.testing.assert_allclose(got, jitted("xla")[0](data), rtol=1e-4, atol=1e-6)
    table = np.asarray(data["block_table"])
    visible = index_cases.visible_tokens(table, np.asarray(data["cache_seqlens"]), 2, True, 3)
    first = np.clip(first_block, 0, 2)
    blocks = (first + np.clip(table, 0, 2))[:, :, None] * 64 + np.arange(64)
    rows = blocks.reshape(2, 256)
    expected = index_cases.naive_scores(q, weights, codes[0][rows], scales[0][rows])
    check(got, np.where(visible, expected, -np.inf))


@pytest.mark.parametrize("floats", [1, 9 * 64 * 4])
@pytest.mark.usefixtures("on_cpu")
def test_reference_takes_many_tokens_in_turns(floats: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the cache and of the queries, whose products would otherwise fill the memory."""
    monkeypatch.setattr(indexer, "_CHUNK_FLOATS", floats)
    names = ("blocks", "block_table", "cache_seqlens", "first_block", "layer_blocks")
    arguments = small().arguments

    @jax.jit
    def both(q: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
        *arrays, layer_blocks = (arguments[name] for name in names)
        keys = indexer.Keys(*map(jnp.asarray, arrays), layer_blocks)
        scores = indexer.index_scores(q, weights, keys, causal=True)
        return scores, indexer.index_topk(q, weights, keys, topk=40, causal=True)

    scores, positions = both(jnp.asarray(arguments["q"]), jnp.asarray(arguments["weights"]))
    check(scores, small().expected)
    expected = index_cases.naive_topk(np.asarray(scores), small().visible, 40)
    np.testing.assert_array_equal(positions, expected)


@pytest.mark.usefixtures("on_cpu")
def test_calls_of_different_shapes_one_after_the_other() -> None:
    """On the CPU's threads, which keep their working memory; hostile queries between."""
    other = index_cases.make_problem(IndexCase(b=1, s_q=2, heads=3, s_k=100, dtype="bfloat16"))
    bad = dict(small().arguments, weights=np.full((3, 3, 9), np.nan, np.float32))
    for _ in range(3):
        jax.block_until_ready(run(bad, "kernel"))
        check(run(other.arguments, "kernel"), other.expected)
        check(run(small().arguments, "kernel"), small().expected)
