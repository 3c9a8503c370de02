"""sparse_decode against attention computed naively over the rows as they are stored."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cases
import sparse_cases
import tolerances
from jax_flashmla import _num_parts, make_schedule, sparse_decode
from jax_flashmla.ops.sparse_decode import sm90_refusal
from sparse_cases import Cache, Problem, SparseCase


@pytest.fixture(scope="module", params=sparse_cases.sparse_cases(), ids=str)
def problem(request: pytest.FixtureRequest) -> Problem:
    return sparse_cases.make_problem(request.param)


def run(arguments: dict[str, Any], implementation: str | None, **changes: Any) -> tuple:
    return sparse_decode(**{**arguments, **changes}, implementation=implementation)


def check(got: tuple, case: SparseCase, expected: tuple) -> None:
    bounds = {"out": tolerances.SPARSE_OUT}
    if case.dtype == "float32":
        bounds = tolerances.F32_DECODE
    tolerances.assert_decoded(got, expected, **bounds)


def skip_where_hopper_falls_back(case: SparseCase, request: pytest.FixtureRequest) -> None:
    extra = None if case.extra is None else case.formats[1]
    refusal = sm90_refusal(case.dtype, case.formats[0], extra, case.d_v)
    if request.node.get_closest_marker("gpu") is not None and refusal:
        pytest.skip(refusal)


def bits(x: jax.Array) -> np.ndarray:
    return np.asarray(x).view(np.uint16 if x.dtype.itemsize == 2 else np.uint32)


def test_matches_naive_attention(
    problem: Problem, implementation: str, request: pytest.FixtureRequest
) -> None:
    case = problem.case
    skip_where_hopper_falls_back(case, request)
    got = run(problem.arguments, implementation)
    assert (got[0].dtype, got[1].dtype) == (case.dtype, jnp.float32)
    check(got, case, problem.expected)
    for x, y in zip(got, run(problem.arguments, implementation), strict=True):
        np.testing.assert_array_equal(bits(x), bits(y))


@pytest.mark.gpu
@pytest.mark.parametrize("case", sparse_cases.hopper_cases(), ids=str)
def test_hopper_matches_naive_attention(case: SparseCase) -> None:
    made = sparse_cases.make_problem(case)
    with jax.default_device(jax.devices("cuda")[0]):
        got = run(made.arguments, "kernel")
        again = run(made.arguments, "kernel")
    check(got, case, made.expected)
    for x, y in zip(got, again, strict=True):
        np.testing.assert_array_equal(bits(x), bits(y))


V32 = SparseCase(Cache("v32", 300, 200, 53), s_q=2, h_q=20, lengths="b s_q", sink=True)


@functools.cache
def v32() -> Problem:
    return sparse_cases.make_problem(V32)


@pytest.mark.parametrize("num_parts", [1, 5, 64, 256])
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_any_schedule_gives_the_same_result(
    num_parts: int, batch_invariant: bool, kernel: str
) -> None:
    tokens = np.clip(v32().arguments["topk_length"], 0, 200).reshape(-1)
    schedule = make_schedule(
        -(-tokens // 64) * 64, h_q=20, num_parts=num_parts, batch_invariant=batch_invariant
    )
    check(run(v32().arguments, kernel, schedule=schedule), V32, v32().expected)


def test_many_pieces_and_a_sink_merge_to_the_whole(kernel: str) -> None:
    """More pieces than a warp of the Hopper merge has lanes."""
    case = SparseCase(Cache("v32", 64 * 40, 64 * 40, 64), b=2, h_q=64, sink=True)
    made = sparse_cases.make_problem(case)
    schedule = make_schedule(np.full(2, 64 * 40), h_q=64, num_parts=80)
    check(run(made.arguments, kernel, schedule=schedule), case, made.expected)


def test_schedule_of_other_lengths_gives_the_same_result(kernel: str) -> None:
    schedule = make_schedule(np.array([900, 0, 1, 64] * 2), h_q=20, num_parts=9)
    check(run(v32().arguments, kernel, schedule=schedule), V32, v32().expected)


def test_small_problems_tell_the_kernel_by_their_parts() -> None:
    parts = functools.partial(_num_parts.sparse_num_parts, small_tiles=True)
    sms = parts(tiles=10**6, h_q=64)
    assert parts(tiles=sms // 4, h_q=128) == sms // 8  # tiles of 16 heads
    assert parts(tiles=sms // 4 + 1, h_q=128) == sms // 4 + 1
    assert parts(tiles=10**6, h_q=128) == sms // 2
    assert parts(tiles=sms, h_q=64) == parts(tiles=sms * 3, h_q=32) == sms
    assert parts(tiles=sms // 4, h_q=128, small_tiles=False) == sms // 4  # pieces of one tile
    assert parts(tiles=sms // 2, h_q=128, small_tiles=False) == sms // 2
    assert parts(tiles=10, h_q=64, small_tiles=False) == 10
    assert parts(tiles=0, h_q=64, small_tiles=False) == 1
    assert parts(tiles=sms, h_q=64, small_tiles=False) == sms


@pytest.mark.parametrize(("n", "tiles"), [(1, 1), (1, 10), (2, 10), (1, 64), (7, 9)])
def test_parts_of_the_wide_kernel_have_one_tile_each(n: int, tiles: int) -> None:
    parts = _num_parts.sparse_num_parts(tiles=n * tiles, h_q=64, small_tiles=False)
    cuts = make_schedule(np.full(n, 64 * tiles), h_q=64, num_parts=parts).cuts
    expected = [(i, tile) for i in range(n) for tile in range(tiles)] + [(n, 0)]
    np.testing.assert_array_equal(cuts, expected)


def test_layers_of_one_array_by_a_traced_first_block(implementation: str) -> None:
    case = dataclasses.replace(V32, main=dataclasses.replace(V32.main, layers=3))
    problem = sparse_cases.make_problem(case)
    first = problem.arguments.pop("first_block")
    rest = {k: v for k, v in problem.arguments.items() if k not in ("format", "layer_blocks")}
    static = {"format": problem.arguments["format"], "d_v": 512, "sm_scale": None}
    static["layer_blocks"] = problem.arguments["layer_blocks"]
    arrays = {k: v for k, v in rest.items() if k not in static}

    @jax.jit
    def decode(arrays: dict, first_block: jax.Array) -> tuple:
        return run({**arrays, **static}, implementation, first_block=first_block)

    check(decode(arrays, jnp.int32(first)), case, problem.expected)
    arrays["blocks"] = arrays["blocks"][: -case.main.layer_blocks]  # so that it is the last layer
    for beyond in (first, first + 1, 2**31 - 1):
        check(decode(arrays, jnp.int32(beyond)), case, problem.expected)


def test_row_named_n_times_counts_n_times(implementation: str) -> None:
    rng = np.random.default_rng(cases.SEED)
    q = cases.normal(rng, (1, 1, 3, 24), "float32")
    blocks = cases.normal(rng, (2, 4, 1, 24), "float32")
    decode = functools.partial(sparse_decode, q, blocks, d_v=16, implementation=implementation)
    if jax.config.jax_default_device.platform != "cpu":
        pytest.skip("float32")
    out, lse = decode(np.full((1, 1, 7), 5, np.int32))
    np.testing.assert_allclose(out[0, 0], np.broadcast_to(blocks[1, 1, 0, :16], (3, 16)), rtol=1e-6)
    once = decode(np.full((1, 1, 1), 5, np.int32))[1]
    np.testing.assert_allclose(lse, once + np.log(np.float32(7)), rtol=1e-5)


def test_sink_of_any_size(implementation: str) -> None:
    """It may be so much more or less than the scores that exp overflows."""
    arguments = {**v32().arguments, "attn_sink": None}
    plain, lse = run(arguments, implementation)
    sink = np.array([-np.inf, -1e30, -200, 200, 1e30, np.inf] * 3 + [0.5, -0.5], np.float32)
    out, with_sink = run(arguments, implementation, attn_sink=sink)
    np.testing.assert_array_equal(bits(with_sink), bits(lse))
    finite = np.where(np.isneginf(lse), 0, lse)  # out is 0 there
    over = sink.astype(np.float64) - finite
    share = 1 / (1 + np.exp(np.clip(over, -700, 700)))
    expected = np.asarray(plain, np.float64) * share[..., None]
    tolerances.assert_close("out", out, expected, tolerances.SPARSE_OUT)
    assert not np.asarray(out, np.float32)[..., 3:6, :].any()


@pytest.mark.usefixtures("on_cpu")
def test_many_query_tokens_are_taken_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the reference, whose gathered rows would otherwise fill the memory."""
    monkeypatch.setattr("jax_flashmla.reference.sparse._CHUNK_BYTES", 3 * 200 * 576 * 4)
    check(run(v32().arguments, "xla"), V32, v32().expected)
    total = lambda q: run({**v32().arguments, "q": q}, "xla")[0].sum().astype("f4")  # noqa: E731
    gradient = jax.jit(jax.grad(total))
    assert np.isfinite(np.asarray(gradient(jnp.asarray(v32().arguments["q"])), np.float32)).all()


@pytest.mark.usefixtures("on_cpu")
def test_more_query_tokens_than_a_schedule_holds() -> None:
    rng = np.random.default_rng(cases.SEED)
    q = cases.normal(rng, (2, 9000, 1, 24), "float32")
    blocks = cases.normal(rng, (3, 4, 1, 24), "float32")
    indices = rng.integers(-1, 13, (2, 9000, 3)).astype(np.int32)
    text = str(jax.make_jaxpr(functools.partial(sparse_decode, d_v=16))(q, blocks, indices))
    assert "flashmla_sparse_decode" in text
    assert "flashmla_make_schedule" not in text
    got = sparse_decode(q, blocks, indices, d_v=16)
    expected = sparse_decode(q, blocks, indices, d_v=16, implementation="xla")
    tolerances.assert_decoded(got, expected, **tolerances.F32_DECODE)


# One program for all examples: what varies is data.
DATA = SparseCase(Cache("v4", 80, 70, 7), Cache("v4", 30, 40, 3, layers=2), s_q=2, h_q=3, b=2)


@functools.cache
def jitted(implementation: str) -> Any:
    problem = sparse_cases.make_problem(DATA)
    keep = ("format", "extra_format", "d_v", "sm_scale", "extra_layer_blocks")
    static = {k: v for k, v in problem.arguments.items() if k in keep}
    names = ("q", "blocks", "extra_blocks", "extra_first_block")
    arrays = {k: jnp.asarray(problem.arguments[k]) for k in names}
    # Every slot may be named: none is poison.
    arrays |= {k: jnp.where(arrays[k] == 255, 3, arrays[k]) for k in names[1:3]}
    return jax.jit(lambda x: run({**static, **arrays, **x}, implementation))


ANY = st.integers(-(2**31), 2**31 - 1) | st.integers(-3, 100)


@settings(max_examples=60)
@given(
    indices=st.lists(ANY, min_size=1, max_size=12),
    extra_indices=st.lists(ANY, min_size=1, max_size=12),
    topk_length=st.lists(ANY, min_size=4, max_size=4),
    extra_topk_length=st.lists(ANY, min_size=4, max_size=4),
    attn_sink=st.lists(st.floats(width=32, allow_nan=False), min_size=3, max_size=3),
)
@pytest.mark.usefixtures("on_cpu")
def test_any_indices_lengths_and_sinks(attn_sink: list[float], **numbers: list[int]) -> None:
    shapes = {"indices": (2, 2, 70), "extra_indices": (2, 2, 40)}
    data = {
        name: np.resize(np.array(values), shapes.get(name, (2, 2))).astype(np.int32)
        for name, values in numbers.items()
    }
    data["attn_sink"] = np.array(attn_sink, np.float32)
    got, expected = jitted("kernel")(data), jitted("xla")(data)
    bound = tolerances.Tolerance(absolute=2e-3, relative=2.01 / 128)
    tolerances.assert_decoded(got, expected, out=bound)


@pytest.mark.usefixtures("on_cpu")
def test_calls_of_different_shapes_one_after_the_other() -> None:
    """On the CPU's threads, which keep their working memory; hostile queries between."""
    wide = v32()
    narrow = SparseCase(Cache("dense", 90, 70, 4), d_qk=20, d_v=16, h_q=3, dtype="float32", b=2)
    narrow_problem = sparse_cases.make_problem(narrow)
    bad = dict(wide.arguments, q=np.full_like(wide.arguments["q"], np.nan))
    for _ in range(3):
        jax.block_until_ready(run(bad, "kernel"))
        check(run(narrow_problem.arguments, "kernel"), narrow, narrow_problem.expected)
        check(run(wide.arguments, "kernel"), V32, wide.expected)
