"""sparse_prefill against attention computed naively over the rows that indices name."""

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
import naive
import tolerances
from jax_flashmla import flash_mla_sparse_fwd, sparse_prefill


@dataclasses.dataclass(frozen=True)
class Case:
    s_kv: int
    topk: int
    s_q: int = 3
    h_q: int = 16
    d_qk: int = 576
    d_v: int = 512
    dtype: str = "bfloat16"
    lengths: bool = False
    sink: bool = False
    all_invalid: bool = False

    def __str__(self) -> str:
        return "-".join(str(v) for v in dataclasses.astuple(self))


# FlashMLA's prefill tests, with fewer query tokens; other dimensions.
SHAPES = [
    (128, 128), (256, 256), (512, 512), (592, 128), (1840, 256),
    (1592, 384), (1521, 512), (95, 128), (153, 256), (114, 384),
]  # fmt: skip
CASES = [
    *(
        Case(
            *shape,
            s_q=(1, 3, 5)[i % 3],
            h_q=(64, 128, 20)[i // 2 % 3],
            d_qk=(576, 512)[i % 2],
            dtype=("bfloat16", "bfloat16", "float16")[i // 3 % 3],
            lengths=i % 3 == 1,
            sink=i % 4 > 1,
        )
        for i, shape in enumerate(SHAPES)
    ),
    Case(64, 128, h_q=64, all_invalid=True, sink=True),
    Case(9, 1, s_q=4, h_q=1, d_qk=35, d_v=7),
    Case(40, 70, h_q=5, d_qk=24, d_v=16, dtype="float32", lengths=True, sink=True),
]


# FlashMLA's prefill tests in full, and any number of heads.
HOPPER = [
    *(
        Case(
            *shape,
            s_q=s_q,
            h_q=(64, 128, 20, 96, 1, 200)[(i + j) % (2 if s_q > 99 else 6)],
            d_qk=(576, 512)[(i + j) % 2],
            dtype=("bfloat16", "bfloat16", "float16")[(i + j) // 2 % 3],
            lengths=(i + j) % 3 == 1,
            sink=i % 4 > 1,
        )
        for i, shape in enumerate(SHAPES)
        for j, s_q in enumerate((1, 62, 213))
    ),
    Case(3000, 2048, s_q=150, h_q=64),
    Case(64, 128, s_q=140, h_q=128, all_invalid=True, sink=True),
    Case(50, 3, s_q=70000, h_q=1, lengths=True),
]


def hostile_indices(s_kv: int) -> list[int]:
    return [-(2**31), -123456, -1, s_kv, s_kv + 114514, 2147480000, 2**31 - 1]


@functools.cache
def make(case: Case) -> tuple[dict[str, Any], tuple[np.ndarray, ...]]:
    """Arguments, among them NaN in every row that no query token attends; and what is expected."""
    rng = np.random.default_rng([cases.SEED, case.s_kv, case.topk])
    indices = rng.integers(0, case.s_kv, (case.s_q, case.topk))
    invalid = rng.random(indices.shape) < (1 if case.all_invalid else 0.1)
    indices = np.where(invalid, rng.choice(hostile_indices(case.s_kv), indices.shape), indices)
    lengths = None
    valid = (indices >= 0) & (indices < case.s_kv)
    if case.lengths:
        lengths = rng.integers(0, case.topk + 1, case.s_q).astype(np.int32)
        lengths[0], lengths[-1] = -5, case.topk + 9
        valid &= np.arange(case.topk) < lengths[:, None]
    kv = cases.normal(rng, (case.s_kv, 1, case.d_qk), case.dtype, cases.ROW_SCALE)
    stored = kv[:, 0].astype(np.float64)
    kv[~np.isin(np.arange(case.s_kv), indices[valid])] = np.nan
    q = cases.normal(rng, (case.s_q, case.h_q, case.d_qk), case.dtype, cases.QUERY_SCALE)
    sink = None
    if case.sink:
        sink = rng.standard_normal(case.h_q).astype(np.float32)
        sink[::3], sink[1::3] = np.inf, -np.inf
    results = []
    for some in np.array_split(np.arange(case.s_q), -(-valid.size // 2048)):
        rows = stored[np.where(valid[some], indices[some], 0)]
        scores = naive.scores(q[some], rows, mask=valid[some])
        results.append((*naive.weigh(scores, rows[..., : case.d_v], sink), scores.max(axis=-1)))
    expected = tuple(map(np.concatenate, zip(*results, strict=True)))
    arguments = {"q": q, "kv": kv, "indices": indices.astype(np.int32), "d_v": case.d_v}
    arguments |= {"topk_length": lengths, "attn_sink": sink}
    return arguments, expected


def check(case: Case, got: tuple, expected: tuple) -> None:
    out, lse = tolerances.PREFILL_OUT, tolerances.PREFILL_LSE
    if case.dtype == "float32":
        out, lse = tolerances.F32_DECODE["out"], tolerances.F32_DECODE["lse"]
    names = ("out", "lse", "max_logits")
    for name, x, y, bound in zip(names, got, expected, (out, lse, lse), strict=True):
        tolerances.assert_close(name, x, y, bound)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("implementation", ["xla", "kernel"])
@pytest.mark.usefixtures("on_cpu")
def test_matches_naive_attention(case: Case, implementation: str) -> None:
    arguments, expected = make(case)
    got = sparse_prefill(**arguments, implementation=implementation)
    assert [x.dtype for x in got] == [case.dtype, jnp.float32, jnp.float32]
    check(case, got, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("case", HOPPER, ids=str)
def test_hopper_kernel(case: Case) -> None:
    arguments, expected = make.__wrapped__(case)
    got = sparse_prefill(**arguments, implementation="kernel")
    check(case, got, expected)
    again = sparse_prefill(**arguments, implementation="kernel")
    for x, y in zip(got, again, strict=True):
        np.testing.assert_array_equal(np.asarray(x).view(np.uint8), np.asarray(y).view(np.uint8))


@pytest.mark.usefixtures("on_cpu")
def test_flashmlas_conventions() -> None:
    case = dataclasses.replace(CASES[1], lengths=True)
    arguments, (out, lse, max_logits) = make(case)
    empty = np.isneginf(lse)
    assert empty.any()
    call = arguments | {"indices": arguments["indices"][:, None], "sm_scale": case.d_qk**-0.5}
    got = flash_mla_sparse_fwd(**call)
    check(case, (got[0], got[2], got[1]), (out, np.where(empty, np.inf, lse), max_logits))
    with pytest.raises(ValueError, match=r"indices must be \[s_q, 1, topk\], got shape"):
        flash_mla_sparse_fwd(**{**call, "indices": np.zeros((3, 2, 5), np.int32)})


SMALL = CASES[-1]


def small() -> dict[str, np.ndarray]:
    arguments = {k: v for k, v in make(SMALL)[0].items() if k != "d_v"}
    return arguments | {"kv": np.nan_to_num(arguments["kv"], nan=0.5)}


run = functools.partial(sparse_prefill, d_v=SMALL.d_v)
reference = jax.jit(functools.partial(run, implementation="xla"))
kernel = jax.jit(functools.partial(run, implementation="kernel"))
ANY = st.integers(-(2**31), 2**31 - 1) | st.integers(-3, 50)


@settings(max_examples=40)
@given(st.lists(ANY, min_size=1, max_size=12), st.lists(ANY, min_size=3, max_size=3))
@pytest.mark.usefixtures("on_cpu")
def test_any_indices_and_lengths(indices: list[int], lengths: list[int]) -> None:
    data = small() | {"indices": np.resize(np.array(indices), (3, 70)).astype(np.int32)}
    data["topk_length"] = np.array(lengths, np.int32)
    check(SMALL, kernel(**data), reference(**data))


@pytest.mark.parametrize(
    ("mapped", "axis"),
    [
        (("q",), -1),
        (("kv",), 1),
        (("kv", "q"), -1),
        (("kv", "q"), 2),
        (("indices", "kv", "q", "topk_length"), -1),
        (("indices", "topk_length"), -1),
        (("attn_sink", "kv", "q"), -1),
    ],
    ids=str,
)
@pytest.mark.usefixtures("on_cpu")
def test_vmap(mapped: tuple[str, ...], axis: int) -> None:
    whole = {k: np.stack([x, np.roll(x, 1, 0), np.roll(x, 2, -1)]) for k, x in small().items()}
    given = {k: np.moveaxis(x, 0, axis) if k in mapped else x[0] for k, x in whole.items()}
    axes = ({k: axis if k in mapped else None for k in whole},)
    got = jax.vmap(lambda x: run(**x), in_axes=axes)(given)
    for i in range(3):
        one = {k: x[i if k in mapped else 0] for k, x in whole.items()}
        check(SMALL, [x[i] for x in got], reference(**one))


@pytest.mark.usefixtures("on_cpu")
def test_derivatives_and_shapes() -> None:
    data = small()
    with pytest.raises(NotImplementedError, match="sparse_prefill cannot be differentiated"):
        jax.grad(lambda q: run(**{**data, "q": q})[0].sum())(data["q"])
    gradient = jax.grad(lambda q: reference(**{**data, "q": q})[0].sum())(data["q"])
    assert np.isfinite(gradient).all()
    shapes = {k: jax.ShapeDtypeStruct(x.shape, x.dtype) for k, x in data.items()}
    got = [(x.shape, x.dtype) for x in jax.eval_shape(lambda x: run(**x), shapes)]
    assert got == [((3, 5, 16), jnp.float32)] + [((3, 5), jnp.float32)] * 2


WRONG = [
    ({"q": np.zeros((3, 24), np.float32)}, ValueError, "q must have rank 3 [s_q, h_q, d_qk]"),
    ({"kv": np.zeros((9, 2, 24), np.float32)}, ValueError, "kv must be [s_kv, 1, d_qk] with q's"),
    ({"kv": np.zeros((9, 1, 24), np.float16)}, TypeError, "kv must have q's dtype float32, got"),
    ({"indices": np.zeros((2, 70), np.int32)}, ValueError, "with q's s_q = 3, got shape (2, 70)"),
    ({"indices": np.zeros((3, 7), np.float32)}, TypeError, "indices must have dtype int32"),
    ({"topk_length": np.zeros(2, np.int32)}, ValueError, "one entry per query token, s_q = 3"),
    ({"attn_sink": np.zeros(4, np.float32)}, ValueError, "one entry per head, h_q = 5, got shape"),
    ({"d_v": 25}, ValueError, "d_v must be at most d_qk = 24"),
    ({"sm_scale": -1.0}, ValueError, "sm_scale must be finite and positive"),
    ({"implementation": "cuda"}, ValueError, 'implementation must be None, "kernel" or "xla"'),
]


@pytest.mark.parametrize(("wrong", "error", "message"), WRONG)
@pytest.mark.usefixtures("on_cpu")
def test_wrong_calls(wrong: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error) as raised:
        run(**{**small(), **wrong})
    assert message in str(raised.value)
