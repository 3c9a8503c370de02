# ruff: noqa: E501 (one wrong call a line)
"""Wrong calls of the indexer's operations get an error that names the argument, what was expected and what came."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jax_flashmla import CacheFormat, SplitSchedule, index_scores, index_topk, make_schedule

pytestmark = pytest.mark.usefixtures("on_cpu")

E4M3, BF16, F16, F32, I32, U8 = (
    ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16, np.float16, np.float32, np.int32, np.uint8
)  # fmt: skip


def zeros(*shape: int, dtype: Any = F32) -> np.ndarray:
    return np.zeros(shape, dtype)


def struct(*shape: int, dtype: Any = F32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


RIGHT = {
    "q": zeros(2, 3, 4, 128, dtype=E4M3),
    "weights": zeros(2, 3, 4),
    "blocks": zeros(5, 64 * 132, dtype=U8),
    "block_table": zeros(2, 2, dtype=I32),
    "cache_seqlens": zeros(2, dtype=I32),
    "format": CacheFormat(name="fp8_index"),
}
NO_KEYS = {"q": None, "weights": None, "blocks": None, "format": None}
GIVEN = {**NO_KEYS, "scores": zeros(2, 3, 128)}
MANY = {"q": struct(2**15, 2**11, 64, 128, dtype=E4M3), "weights": struct(2**15, 2**11, 64)}

WRONG_OF_BOTH: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"q": zeros(2, 4, 128, dtype=E4M3)}, ValueError, "q must have rank 4 [b, s_q, heads, 128], got shape (2, 4, 128)"),
    ({"q": zeros(2, 3, 4, 128, dtype=F16)}, TypeError, "q must have dtype float8_e4m3fn or bfloat16, got float16"),
    ({"q": zeros(2, 3, 4, 64, dtype=BF16)}, ValueError, "q must have 128 columns, got shape (2, 3, 4, 64)"),
    ({"q": zeros(2, 3, 65, 128, dtype=BF16), "weights": zeros(2, 3, 65)}, ValueError, "q must have at most 64 heads, got 65 in shape (2, 3, 65, 128)"),
    ({"q": zeros(2, 0, 4, 128, dtype=BF16)}, ValueError, "q [b, s_q, heads, 128] must have no empty dimension"),
    ({"q": None}, TypeError, "q must be an array [b, s_q, heads, 128], got None of type NoneType"),
    (MANY, ValueError, "q must have less than 2^31 rows b * s_q * heads, got 32768 * 2048 * 64 = 4294967296"),
    ({"weights": zeros(2, 3, 5)}, ValueError, "weights must be [b, s_q, heads] as q, (2, 3, 4), got (2, 3, 5)"),
    ({"weights": zeros(2, 3, 4, dtype=BF16)}, TypeError, "weights must have dtype float32, got bfloat16"),
    ({"weights": zeros(2, 4)}, ValueError, "weights must have rank 3 [b, s_q, heads], got shape (2, 4)"),
    # keys
    ({"format": None}, TypeError, "format must be a CacheFormat, got None of type NoneType"),
    ({"format": "fp8_index"}, TypeError, "format must be a CacheFormat, got 'fp8_index' of type str"),
    ({"format": CacheFormat(name="v32")}, ValueError, "format must be fp8_index for an indexer's keys, got v32"),
    ({"blocks": zeros(5, 64, 132, dtype=U8)}, ValueError, "blocks must have rank 2 [num_blocks, block_bytes], got shape (5, 64, 132)"),
    ({"blocks": zeros(5, 64 * 132, dtype=np.int8)}, TypeError, "blocks must have dtype uint8, got int8"),
    ({"blocks": zeros(5, 64 * 128, dtype=U8)}, ValueError, "blocks must be [num_blocks, 8448] in the given format, got shape (5, 8192)"),
    ({"blocks": None}, TypeError, "blocks must be an array [num_blocks, block_bytes], got None"),
    ({"first_block": 1}, ValueError, "first_block must be between 0 and 0, got 1"),
    ({"first_block": -1, "layer_blocks": 2}, ValueError, "first_block must be between 0 and 3, got -1"),
    ({"first_block": 1.5}, TypeError, "first_block must be an array [], got 1.5 of type float"),
    ({"first_block": True}, TypeError, "first_block must be an integer scalar, got True"),
    ({"layer_blocks": 6}, ValueError, "layer_blocks must be between 1 and 5, got 6"),
    ({"layer_blocks": np.float32(2)}, TypeError, "layer_blocks must be a Python int (it is compiled in)"),
    ({"blocks": struct(2**26, 64 * 132, dtype=U8)}, ValueError, "layer_blocks * block_size must be at most 2^31 - 1 slots, got 67108864 * 64"),
    # the table
    ({"block_table": zeros(3, 2, dtype=I32)}, ValueError, "block_table must have one row per sequence, b = 2, got shape (3, 2)"),
    ({"block_table": zeros(2, 2)}, TypeError, "block_table must have dtype int32, or another integer's, got float32"),
    ({"block_table": struct(2, 2**25, dtype=I32)}, ValueError, "block_table must hold at most 2^31 - 1 tokens per sequence"),
    ({"block_table": np.full((2, 2), 2**40)}, ValueError, "block_table must fit in int32, got 1099511627776"),
    ({"cache_seqlens": zeros(3, dtype=I32)}, ValueError, "cache_seqlens must have one entry per sequence of q, b = 2, got shape (3,)"),
    ({"cache_seqlens": 7}, ValueError, "cache_seqlens must have rank 1 [b], got shape ()"),
    # the rest
    ({"causal": 1}, TypeError, "causal must be a Python bool (it is compiled in), got 1 of type int"),
    ({"implementation": "cuda"}, ValueError, 'implementation must be None, "kernel" or "xla", got \'cuda\''),
    ({"schedule": zeros(3, 2, dtype=I32)}, TypeError, "schedule must be a SplitSchedule from make_schedule, got ndarray"),
    ({"schedule": SplitSchedule(zeros(3, 2, dtype=I32), b=6)}, ValueError, "schedule must be made for q's batch of b = 2 sequences, got one made for b = 6"),
]  # fmt: skip

WRONG_OF_TOPK: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"topk": 0}, ValueError, "topk must be between 1 and 4096, got 0"),
    ({"topk": 4097}, ValueError, "topk must be between 1 and 4096, got 4097"),
    ({"topk": 2.0}, TypeError, "topk must be a Python int (it is compiled in), got 2.0 of type float"),
    ({"return_positions": None}, TypeError, "return_positions must be a Python bool (it is compiled in), got None"),
    ({"scores": zeros(2, 3, 128)}, ValueError, "q must be None with scores, got a ndarray"),
    ({**GIVEN, "weights": RIGHT["weights"]}, ValueError, "weights must be None with scores, got a ndarray"),
    ({**GIVEN, "blocks": RIGHT["blocks"]}, ValueError, "blocks must be None with scores, got a ndarray"),
    ({**GIVEN, "format": CacheFormat(name="v4")}, ValueError, "format must be fp8_index for an indexer's keys, got v4"),
    ({**GIVEN, "scores": zeros(2, 128)}, ValueError, "scores must have rank 3 [b, s_q, max_blocks * 64], got shape (2, 128)"),
    ({**GIVEN, "scores": zeros(2, 3, 128, dtype=BF16)}, TypeError, "scores must have dtype float32, got bfloat16"),
    ({**GIVEN, "scores": zeros(2, 3, 64)}, ValueError, "scores must be of block_table's max_blocks * 64 = 128 tokens, got shape (2, 3, 64)"),
    ({**GIVEN, "scores": zeros(3, 3, 128)}, ValueError, "cache_seqlens must have one entry per sequence of scores, b = 3, got shape (2,)"),
    ({**GIVEN, "layer_blocks": 2**25}, ValueError, "layer_blocks must be between 1 and 33554431, got 33554432"),
    ({**GIVEN, "first_block": -1}, ValueError, "first_block must be between 0 and 33554431, got -1"),
]  # fmt: skip


def topk(**wrong: Any) -> Any:
    """Of b = 2, s_q = 3, 4 heads and 2 blocks a sequence, but for `wrong`."""
    return index_topk(**{**RIGHT, "topk": 7, **wrong})


def scores(**wrong: Any) -> Any:
    return index_scores(**{**RIGHT, **wrong})


CASES = [(call, *case) for call in (scores, topk) for case in WRONG_OF_BOTH]
CASES += [(topk, *case) for case in WRONG_OF_TOPK]


@pytest.mark.parametrize(
    ("call", "wrong", "error", "message"),
    CASES,
    ids=[f"{i}-{call.__name__}-{'-'.join(wrong)}" for i, (call, wrong, *_) in enumerate(CASES)],
)
def test_wrong_call(call: Any, wrong: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call(**wrong)


def test_the_calls_that_they_are_made_from_are_right() -> None:
    schedule = make_schedule(np.array([64, 64]), h_q=1)
    assert scores(schedule=schedule, causal=np.True_).shape == (2, 3, 128)
    for call in ({}, GIVEN, {**GIVEN, "format": RIGHT["format"], "first_block": 3}):
        indices, positions = topk(return_positions=True, **call)
        assert (indices.shape, positions.shape) == ((2, 3, 7), (2, 3, 7))
        np.testing.assert_array_equal(indices, -1)


def test_traced_where_static() -> None:
    with pytest.raises(TypeError, match=r"topk must be a Python int .* got a traced value"):
        jax.jit(lambda n: topk(topk=n))(3)
    with pytest.raises(TypeError, match=r"layer_blocks must be a Python int .* got a traced value"):
        jax.jit(lambda n: scores(layer_blocks=n))(3)
    with pytest.raises(TypeError, match=r"first_block must have dtype int32, .* got float32"):
        jax.jit(lambda x: scores(first_block=x))(jnp.float32(0))
