"""Packed queries of ragged batches: dense_decode and cache_append with cu_q_lens."""

from __future__ import annotations

import dataclasses
import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cases
import naive
import tolerances
from jax_flashmla import CacheFormat, cache_append, dense_decode, make_schedule


@dataclasses.dataclass(frozen=True)
class Ragged:
    """Sequences with so many new tokens of so many tokens in the cache."""

    q_lens: tuple[int, ...]
    seqlens: tuple[int, ...]
    h_q: int
    h_kv: int = 1
    before: int = 0  # tokens of nobody before the first sequence's,
    after: int = 0  # and after the last one's
    max_q_len: int | None = None
    d_qk: int = 576
    d_v: int = 512
    block_size: int = 64
    dtype: str = "bfloat16"

    @property
    def num_tokens(self) -> int:
        return self.before + sum(self.q_lens) + self.after

    @property
    def cu_q_lens(self) -> np.ndarray:
        return (self.before + np.cumsum([0, *self.q_lens])).astype(np.int32)


@functools.cache
def make(case: Ragged) -> tuple[np.ndarray, cases.DecodeInputs]:
    """Packed queries, NaN where they are nobody's; and a cache (its q is not for use)."""
    rng = np.random.default_rng(cases.SEED)
    b, s_k = len(case.seqlens), max(case.seqlens)
    lengths = np.array(case.seqlens, np.int32)
    table, num_blocks = cases.make_table(lengths, case.block_size, -(-s_k // case.block_size) + 1)
    keys = cases.normal(rng, (b, s_k, case.h_kv, case.d_qk), case.dtype, cases.ROW_SCALE)
    blocks = np.full((num_blocks, case.block_size, case.h_kv, case.d_qk), np.nan, keys.dtype)
    for i, length in enumerate(lengths):
        token = np.arange(length)
        blocks[table[i, token // case.block_size], token % case.block_size] = keys[i, :length]
    q = cases.normal(rng, (case.num_tokens, case.h_q, case.d_qk), case.dtype, cases.QUERY_SCALE)
    q[: case.before] = np.nan
    q[case.num_tokens - case.after :] = np.nan
    return q, cases.DecodeInputs(q, keys, blocks, table, lengths)


def bits(x: jax.Array) -> np.ndarray:
    return np.asarray(x).view(np.uint16 if x.dtype.itemsize == 2 else np.uint32)


def run(case: Ragged, **options: object) -> tuple[jax.Array, jax.Array]:
    q, inputs = make(case)
    defaults = {"cu_q_lens": case.cu_q_lens, "max_q_len": case.max_q_len, "d_v": case.d_v}
    arguments = inputs.blocks, inputs.block_table, inputs.cache_seqlens
    return dense_decode(q, *arguments, **{**defaults, **options})


def expect(case: Ragged, causal: bool) -> tuple[np.ndarray, np.ndarray]:
    q, inputs = make(case)
    out = np.zeros((case.num_tokens, case.h_q, case.d_v))
    lse = np.full((case.num_tokens, case.h_q), -np.inf)
    for i, (keys, length) in enumerate(zip(inputs.keys, case.seqlens, strict=True)):
        mine = slice(*case.cu_q_lens[i : i + 2])
        if case.q_lens[i]:
            out[mine], lse[mine] = naive.dense(q[mine], keys, length, d_v=case.d_v, causal=causal)
    return out, lse


CASES = {
    "decode": Ragged((1, 1, 1), (70, 1, 130), 16, max_q_len=1),
    "decode with empty slots": Ragged((1, 0, 1, 0), (70, 9, 130, 0), 16, after=3, max_q_len=1),
    "mixed": Ragged((1, 7, 0, 4, 13), (30, 7, 5, 70, 213), 16, before=2, after=5),
    "mixed, 3 tokens a tile": Ragged((2, 7, 1, 6), (90, 70, 65, 6), 20, max_q_len=7, after=1),
    "whole prompts": Ragged((5, 66), (5, 66), 9, dtype="float16"),
    "a token a tile": Ragged((1, 3, 2), (30, 140, 2), 64, after=2),
    "two tiles a token": Ragged((2, 1), (100, 64), 128),
    "several KV heads": Ragged((1, 3, 0, 2), (30, 140, 9, 2), 6, 2, before=1, block_size=16),
    "more queries than tokens": Ragged((6, 3), (4, 0), 16),
}


COMPILED = ("mixed", "mixed, 3 tokens a tile", "a token a tile")  # of the reference


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("name", CASES)
def test_matches_naive_attention(name: str, causal: bool, implementation: str) -> None:
    case = CASES[name]
    both = ("mixed", "several KV heads")
    if (not causal and name not in both) or (implementation == "xla" and name not in COMPILED):
        pytest.skip("takes long to compile, and other cases have it")
    got = run(case, causal=causal, implementation=implementation)
    assert got[0].dtype == case.dtype
    tolerances.assert_decoded(got, expect(case, causal))


@pytest.mark.parametrize(("h_q", "s_q"), [(16, 4), (16, 6), (64, 2), (3, 5)])
def test_equal_bits_to_the_padded_call(
    h_q: int, s_q: int, kernel: str, request: pytest.FixtureRequest
) -> None:
    case = Ragged((s_q,) * 3, (70, 9, 130), h_q)
    q, inputs = make(case)
    one_part = {"h_q": h_q, "num_parts": 1}
    packed = make_schedule(
        inputs.cache_seqlens, cu_q_lens=case.cu_q_lens, num_tokens=3 * s_q, causal=True, **one_part
    )
    got = run(case, causal=True, schedule=packed, implementation=kernel)
    expected = dense_decode(
        q.reshape(3, s_q, h_q, 576),
        *inputs.arguments[1:],
        causal=True,
        schedule=make_schedule(inputs.cache_seqlens, s_q=s_q, **one_part),
        implementation=kernel,
    )
    expected = tuple(y.reshape(x.shape) for x, y in zip(got, expected, strict=True))
    if request.node.get_closest_marker("gpu") is not None and h_q % 16:
        # On Hopper sixteen rows move their softmax references together, and have other neighbours.
        tolerances.assert_decoded(got, tuple(np.asarray(y, np.float64) for y in expected))
        return
    for x, y in zip(got, expected, strict=True):
        np.testing.assert_array_equal(bits(x), bits(y))


def test_a_step_that_only_decodes_is_the_padded_step(kernel: str) -> None:
    """With the schedules that both make."""
    case = Ragged((1,) * 5, (700, 9, 130, 64, 1), 16, max_q_len=1)
    q, inputs = make(case)
    got = run(case, implementation=kernel)
    expected = dense_decode(q[:, None], *inputs.arguments[1:], implementation=kernel)
    for x, y in zip(got, expected, strict=True):
        np.testing.assert_array_equal(bits(x), bits(y)[:, 0])


@pytest.mark.parametrize("h_q", [16, 128])
@pytest.mark.gpu
def test_a_chunk_among_decoding_sequences(h_q: int) -> None:
    """On Hopper, against the padded calls of each kind."""
    lengths = tuple(int(n) for n in np.random.default_rng(cases.SEED).integers(1, 2000, 40))
    case = Ragged((1,) * 39 + (300,), (*lengths[:39], 1500), h_q, after=20)
    q, inputs = make(case)
    got = run(case, causal=True, implementation="kernel")
    decode = functools.partial(dense_decode, causal=True, implementation="kernel")
    _, blocks, table, seqlens = inputs.arguments
    one = decode(q[:39, None], blocks, table[:39], seqlens[:39])
    chunk = decode(q[None, 39:339], blocks, table[39:], seqlens[39:])
    for x, y, z in zip(got, one, chunk, strict=True):
        expected = np.concatenate([np.asarray(y)[:, 0], np.asarray(z)[0]])
        bound = tolerances.OUT if x.ndim == 3 else tolerances.LSE
        tolerances.assert_close("out or lse", x[:339], expected, bound)
    assert not np.asarray(got[0], np.float32)[339:].any()
    assert np.isneginf(got[1][339:]).all()


SMALL = Ragged((1, 5, 0, 3), (9, 30, 4, 3), 4, after=2, d_qk=24, d_v=16, block_size=8)


@pytest.mark.parametrize(
    ("hostile", "means"),
    [
        ([0, 1, 6, 6, 2**31 - 1], [0, 1, 6, 6, 11]),
        ([-(2**31), 1, 6, 5, 9], [0, 1, 6, 6, 9]),
        ([3, 7, 2, -8, 9], [3, 7, 7, 7, 9]),
        ([12, 13, 14, 15, 16], [11, 11, 11, 11, 11]),
    ],
)
@pytest.mark.parametrize("h_q", [4, 64])
@pytest.mark.usefixtures("on_cpu")
def test_hostile_bounds_are_clamped(hostile: list[int], means: list[int], h_q: int) -> None:
    case = dataclasses.replace(SMALL, h_q=h_q, after=0, q_lens=(1, 5, 0, 5))
    for implementation in ("kernel", "xla"):
        got, expected = (
            run(case, cu_q_lens=np.array(cu, np.int32), implementation=implementation)
            for cu in (hostile, means)
        )
        for x, y in zip(got, expected, strict=True):
            np.testing.assert_array_equal(bits(x), bits(y))
        padding = np.r_[0 : means[0], means[-1] : 11]
        assert not np.asarray(got[0], np.float32)[padding].any()
        assert np.isneginf(np.asarray(got[1])[padding]).all()
        assert np.isfinite(np.asarray(got[1])[means[0] : means[-1]]).all()


@pytest.mark.parametrize("h_q", [4, 64])
@pytest.mark.usefixtures("on_cpu")
def test_tokens_past_max_q_len_are_padding(h_q: int) -> None:
    case = dataclasses.replace(SMALL, h_q=h_q)
    expected = [np.asarray(x, np.float32) for x in expect(case, True)]
    for x, fill in zip(expected, (0, -np.inf), strict=True):
        x[1 + 2 : 1 + 5] = fill
        x[6 + 2 : 6 + 3] = fill
    got = run(case, causal=True, max_q_len=2)
    tolerances.assert_decoded(got, expected)


@pytest.mark.usefixtures("on_cpu")
def test_more_tokens_than_a_schedule_holds() -> None:
    n = 16400
    case = Ragged((n - 3, 1), (20, 9), 2, 2, after=2, d_qk=8, d_v=8, block_size=8, dtype="float32")
    out, lse = run(case, implementation="kernel")
    q, inputs = make(case)
    some = np.r_[0:3, n - 6 : n - 3]
    expected = naive.dense(q[some], inputs.keys[0], 20, d_v=8)
    tolerances.assert_decoded((out[some], lse[some]), expected, **tolerances.F32_DECODE)
    assert np.isneginf(lse[-2:]).all()


@pytest.mark.usefixtures("on_cpu")
def test_schedule_of_packed_queries() -> None:
    q, inputs = make(SMALL)
    make_one = functools.partial(
        make_schedule, inputs.cache_seqlens, h_q=4, num_tokens=11, causal=True
    )
    schedule = make_one(cu_q_lens=SMALL.cu_q_lens)
    made_here = run(SMALL, causal=True)
    for given in (schedule, make_one(cu_q_lens=SMALL.cu_q_lens, batch_invariant=True)):
        got = run(SMALL, causal=True, schedule=given)
        tolerances.assert_decoded(got, [np.asarray(x, np.float32) for x in made_here])
    other = make_one(cu_q_lens=SMALL.cu_q_lens, max_q_len=1)  # other groups of tokens
    assert other.b == 11
    with pytest.raises(ValueError, match="schedule must be made for q's T = 11 packed tokens"):
        run(SMALL, schedule=other)
    for wrong, message in (
        ({"cu_q_lens": SMALL.cu_q_lens, "s_q": 2}, "s_q must not be given with cu_q_lens"),
        ({"cu_q_lens": SMALL.cu_q_lens[:3]}, "cache_seqlens must have one entry per sequence, b ="),
        ({}, "num_tokens must be None without cu_q_lens, got 11"),
    ):
        with pytest.raises(ValueError, match=message):
            make_one(**wrong)


@pytest.mark.usefixtures("on_cpu")
def test_transformations() -> None:
    q, inputs = make(dataclasses.replace(SMALL, after=0, dtype="float32"))
    cu = SMALL.cu_q_lens

    def decode(q: jax.Array, lengths: jax.Array, implementation: str | None = None) -> tuple:
        return dense_decode(
            q, inputs.blocks, inputs.block_table, lengths, d_v=16, causal=True, cu_q_lens=cu,
            implementation=implementation,
        )  # fmt: skip

    expected = decode(q, inputs.cache_seqlens)
    for x, y in zip(jax.jit(decode)(q, inputs.cache_seqlens), expected, strict=True):
        np.testing.assert_array_equal(x, y)
    lengths = jnp.stack([inputs.cache_seqlens, inputs.cache_seqlens // 2])
    mapped = jax.vmap(decode, in_axes=(None, 0))(q, lengths)
    for i in range(2):
        one = decode(q, lengths[i])
        tolerances.assert_decoded([x[i] for x in mapped], one, **tolerances.F32_DECODE)
    loss = lambda q: decode(q, inputs.cache_seqlens, "xla")[0].sum()  # noqa: E731
    assert np.isfinite(jax.jit(jax.grad(loss))(jnp.asarray(q))).all()


@pytest.mark.parametrize("h_q", [16, 128])
def test_lowers_for_hopper_to_one_call_over_an_engines_rows(h_q: int) -> None:
    shape = jax.ShapeDtypeStruct
    arguments = (
        shape((70, h_q, 576), jnp.bfloat16),
        shape((9, 16, 1, 640), jnp.bfloat16),
        shape((3, 5), jnp.int32),
        shape((3,), jnp.int32),
    )

    def step(q: jax.Array, blocks: jax.Array, table: jax.Array, lengths: jax.Array) -> tuple:
        format = CacheFormat(block_size=16, row_stride=640)
        cu = jnp.asarray([0, 1, 2, 60], jnp.int32)
        return dense_decode(q, blocks, table, lengths, cu_q_lens=cu, format=format)

    with warnings.catch_warnings():  # of a fallback
        warnings.simplefilter("error")
        traced = jax.jit(step).trace(*arguments)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@flashmla_dense_decode_v1(") == 1
    assert text.count("@flashmla_make_schedule_v1(") == 1


def append_expected(
    blocks: np.ndarray, rows: np.ndarray, table: np.ndarray, positions: list[int],
    num_new: list[int], cu: list[int],
) -> np.ndarray:  # fmt: skip
    blocks = blocks.copy()
    for i, first in enumerate(positions):
        for j in range(min(num_new[i], cu[i + 1] - cu[i])):
            block, slot = divmod(first + j, blocks.shape[1])
            if 0 <= block < table.shape[1] and 0 <= table[i, block] < len(blocks):
                blocks[table[i, block], slot] = rows[cu[i] + j]
    return blocks


@pytest.mark.parametrize("num_new", [None, [9, 1, 0, 9, 3]])
def test_append_of_packed_rows(num_new: list[int] | None, implementation: str) -> None:
    rng = np.random.default_rng(cases.SEED)
    rows = cases.normal(rng, (14, 2, 8), "bfloat16")
    blocks = np.full((20, 4, 2, 8), np.nan, rows.dtype)
    table = rng.permutation(20)[:15].reshape(5, 3).astype(np.int32)
    table[3, 1] = 20  # out of range
    positions, cu = [0, 3, 2, -1, 10], [1, 3, 4, 4, 10, 13]
    append = jax.jit(
        functools.partial(cache_append, implementation=implementation), donate_argnums=0
    )
    cache = jnp.array(blocks)
    got = append(
        cache, rows, table, np.array(positions, np.int32), cu_q_lens=np.array(cu, np.int32),
        num_new=None if num_new is None else np.array(num_new, np.int32),
    )  # fmt: skip
    assert cache.is_deleted()
    expected = append_expected(blocks, rows, table, positions, num_new or [99] * 5, cu)
    np.testing.assert_array_equal(bits(got), bits(expected))


@pytest.mark.usefixtures("on_cpu")
def test_append_of_packed_rows_to_a_format() -> None:
    format = CacheFormat(name="v32", block_size=4)
    rows = cases.normal(np.random.default_rng(0), (5, 1, 576), "bfloat16")
    table, positions = np.array([[0, 1], [2, 3]], np.int32), np.array([3, 0], np.int32)
    cu = np.array([0, 2, 5], np.int32)
    got = cache_append(format.allocate(4), rows, table, positions, cu_q_lens=cu, format=format)
    padded = np.zeros((2, 3, 1, 576), rows.dtype)
    padded[0, :2], padded[1] = rows[:2], rows[2:]
    expected = cache_append(
        format.allocate(4), padded, table, positions, num_new=np.diff(cu), format=format
    )
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"cu_q_lens": np.zeros(1, np.int32)}, ValueError, r"cu_q_lens must have b \+ 1 >= 2"),
        ({"cu_q_lens": np.zeros(5, np.float32)}, TypeError, "cu_q_lens must have dtype int32"),
        ({"cu_q_lens": np.zeros(4, np.int32)}, ValueError, "block_table must have one row per seq"),
        ({"q": np.zeros((1, 11, 4, 24), jnp.bfloat16)}, ValueError, r"q must have rank 3 \[T, h_q"),
        ({"max_q_len": 0}, ValueError, "max_q_len must be between 1 and"),
        ({"max_q_len": 2.0}, TypeError, "max_q_len must be a Python int"),
        ({"cu_q_lens": None}, ValueError, r"q must have rank 4 \[b, s_q, h_q, d_qk\]"),
        (
            {"cu_q_lens": None, "q": np.zeros((4, 1, 4, 24), jnp.bfloat16), "max_q_len": 2},
            ValueError,
            "max_q_len must be None without cu_q_lens",
        ),
    ],
)
@pytest.mark.usefixtures("on_cpu")
def test_wrong_arguments_are_named(wrong: dict, error: type, message: str) -> None:
    q, inputs = make(SMALL)
    arguments = {
        "q": q,
        "blocks": inputs.blocks,
        "block_table": inputs.block_table,
        "cache_seqlens": inputs.cache_seqlens,
        "cu_q_lens": SMALL.cu_q_lens,
        "d_v": 16,
    }
    with pytest.raises(error, match=message):
        dense_decode(**{**arguments, **wrong})


@pytest.mark.usefixtures("on_cpu")
def test_wrong_packed_rows_are_named() -> None:
    rows, cu = np.zeros((3, 1, 8), np.float32), np.array([0, 3], np.int32)
    append = functools.partial(
        cache_append, np.zeros((2, 4, 1, 8), np.float32), block_table=np.zeros((1, 2), np.int32),
        positions=np.zeros(1, np.int32),
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"rows must have rank 3 \[T, h_kv, d_qk\]"):
        append(rows=rows[None], cu_q_lens=cu)
    with pytest.raises(ValueError, match=r"rows must have rank 4"):
        append(rows=rows)
    with pytest.raises(ValueError, match="block_table must have one row per sequence, b = 2"):
        append(rows=rows, cu_q_lens=np.array([0, 1, 3], np.int32))
