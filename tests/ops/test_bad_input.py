# ruff: noqa: E501 (one wrong call a line)
"""Wrong calls get an error that names the argument, what was expected and what came.

And hostile values, which no type can rule out, neither crash nor reach what they should not.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import cases
import naive
import tolerances
from jax_flashmla import CacheFormat, SplitSchedule, cache_append, dense_decode, make_schedule

BF16, F16, I32 = ml_dtypes.bfloat16, np.float16, np.int32


def zeros(*shape: int, dtype: Any = BF16) -> np.ndarray:
    return np.zeros(shape, dtype)


def i32(*shape: int) -> np.ndarray:
    return zeros(*shape, dtype=I32)


def decode(**wrong: Any) -> Any:
    """dense_decode of b = 2, s_q = 1, h_q = 6, h_kv = 2, d_qk = 24, d_v = 16, but for `wrong`."""
    right = {
        "q": zeros(2, 1, 6, 24),
        "blocks": zeros(5, 8, 2, 24),
        "block_table": i32(2, 3),
        "cache_seqlens": i32(2),
        "d_v": 16,
    }
    return dense_decode(**{**right, **wrong})


def schedule(**wrong: Any) -> Any:
    return make_schedule(**{"cache_seqlens": i32(2), "h_q": 6, **wrong})


def append(**wrong: Any) -> Any:
    right = {
        "blocks": zeros(5, 8, 2, 24),
        "rows": zeros(2, 3, 2, 24),
        "block_table": i32(2, 3),
        "positions": i32(2),
    }
    return cache_append(**{**right, **wrong})


def cuts(*shape: int, b: int = 2, dtype: Any = I32) -> SplitSchedule:
    return SplitSchedule(zeros(*shape, dtype=dtype), b=b)


def donated() -> jax.Array:
    blocks = jnp.zeros((5, 8, 2, 24), jnp.bfloat16)
    blocks.delete()  # what donation does to its argument
    return blocks


class Foreign:
    """Stands for a tensor of PyTorch's, which has shape, dtype and __dlpack__."""

    shape, dtype = (2, 1, 6, 24), "torch.bfloat16"

    def __dlpack__(self) -> None:
        raise AssertionError


Foreign.__module__, Foreign.__qualname__ = "torch", "Tensor"


WRONG_CALLS: list[tuple[Callable, dict[str, Any], type[Exception], str]] = [
    # q
    (decode, {"q": zeros(2, 6, 24)}, ValueError, "q must have rank 4 [b, s_q, h_q, d_qk], got shape (2, 6, 24)"),
    (decode, {"q": [[1.0]]}, TypeError, "q must be an array [b, s_q, h_q, d_qk], got [[1.0]] of type list"),
    (decode, {"block_table": [[0, 1, 2], [3]]}, ValueError, "block_table must be [b, max_blocks], got lists of unequal lengths"),
    (decode, {"q": None}, TypeError, "q must be an array [b, s_q, h_q, d_qk], got None of type NoneType"),
    (decode, {"q": zeros(2, 1, 6, 24, dtype=np.float64)}, TypeError, "q must have dtype bfloat16, float16 or float32, got float64"),
    (decode, {"q": zeros(2, 1, 6, 24, dtype=np.int8)}, TypeError, "q must have dtype bfloat16, float16 or float32, got int8"),
    (decode, {"q": zeros(0, 1, 6, 24)}, ValueError, "q [b, s_q, h_q, d_qk] must have no empty dimension, got shape (0, 1, 6, 24)"),
    (decode, {"q": zeros(2, 0, 6, 24)}, ValueError, "q [b, s_q, h_q, d_qk] must have no empty dimension, got shape (2, 0, 6, 24)"),
    (decode, {"q": zeros(2, 1, 7, 24)}, ValueError, "q's h_q must be a multiple of blocks' h_kv = 2, got h_q = 7"),
    (decode, {"q": zeros(16385, 1, 2, 24)}, ValueError, "q must have at most b = 16384 sequences, got 16385"),
    # blocks
    (decode, {"blocks": zeros(5, 8, 24)}, ValueError, "blocks must have rank 4 [num_blocks, block_size, h_kv, d_qk], got shape (5, 8, 24)"),
    (decode, {"blocks": zeros(5, 8, 2, 25)}, ValueError, "blocks must have rows of q's d_qk = 24, got 25 in shape (5, 8, 2, 25)"),
    (decode, {"blocks": zeros(5, 8, 2, 24, dtype=F16)}, TypeError, "blocks must have q's dtype bfloat16, got float16"),
    (decode, {"blocks": zeros(5, 8, 2, 24, dtype=np.uint8)}, TypeError, "format must be given for blocks of uint8"),
    (decode, {"blocks": zeros(0, 8, 2, 24)}, ValueError, "must have no empty dimension, got shape (0, 8, 2, 24)"),
    (decode, {"blocks": zeros(5, 8, 4, 24)}, ValueError, "q's h_q must be a multiple of blocks' h_kv = 4, got h_q = 6"),
    (decode, {"blocks": donated}, ValueError, "blocks must be a live array, got one that was donated or deleted"),
    # block_table
    (decode, {"block_table": i32(6)}, ValueError, "block_table must have rank 2 [b, max_blocks], got shape (6,)"),
    (decode, {"block_table": i32(3, 3)}, ValueError, "block_table must have one row per sequence, b = 2, got shape (3, 3)"),
    (decode, {"block_table": zeros(2, 3, dtype=np.int64) - 2**31 - 1}, ValueError, "block_table must fit in int32, got -2147483649"),
    (decode, {"block_table": zeros(2, 3, dtype=np.uint32) + 2**31}, ValueError, "block_table must fit in int32, got 2147483648"),
    (decode, {"block_table": zeros(2, 3, dtype=np.float32)}, TypeError, "block_table must have dtype int32, or another integer's, got float32"),
    (decode, {"block_table": i32(2, 0)}, ValueError, "block_table [b, max_blocks] must have no empty dimension, got shape (2, 0)"),
    (decode, {"block_table": jax.ShapeDtypeStruct((2, 2**28), I32)}, ValueError, "block_table must hold at most 2^31 - 1 tokens per sequence, got max_blocks = 268435456 of block_size = 8"),
    # cache_seqlens
    (decode, {"cache_seqlens": i32(2, 1)}, ValueError, "cache_seqlens must have rank 1 [b], got shape (2, 1)"),
    (decode, {"cache_seqlens": i32(3)}, ValueError, "cache_seqlens must have one entry per sequence, b = 2, got shape (3,)"),
    (decode, {"cache_seqlens": zeros(2, dtype=bool)}, TypeError, "cache_seqlens must have dtype int32, or another integer's, got bool"),
    (decode, {"cache_seqlens": [3, 2**32 + 1]}, ValueError, "cache_seqlens must fit in int32, got 4294967297"),
    (decode, {"q": jax.ShapeDtypeStruct((2, 2**15, 2**15, 24), BF16)}, ValueError, "q must have less than 2^31 rows b * s_q * h_q, got 2 * 32768 * 32768 = 2147483648"),
    # d_v, sm_scale, causal, implementation
    (decode, {"d_v": 25}, ValueError, "d_v must be at most d_qk = 24 (a value is a row's first d_v columns), got 25"),
    (decode, {"d_v": 512}, ValueError, "d_v must be at most d_qk = 24"),
    (decode, {"d_v": 0}, ValueError, "d_v must be between 1 and 2147483647, got 0"),
    (decode, {"d_v": 16.0}, TypeError, "d_v must be a Python int (it is compiled in), got 16.0 of type float"),
    (decode, {"d_v": True}, TypeError, "d_v must be a Python int (it is compiled in), got True of type bool"),
    (decode, {"sm_scale": 0.0}, ValueError, "sm_scale must be finite and positive in float32, got 0.0"),
    (decode, {"sm_scale": float("nan")}, ValueError, "sm_scale must be finite and positive in float32, got nan"),
    (decode, {"sm_scale": -1}, ValueError, "sm_scale must be finite and positive in float32, got -1"),
    (decode, {"sm_scale": 1e39}, ValueError, "sm_scale must be finite and positive in float32, got 1e+39"),
    (decode, {"sm_scale": "1"}, TypeError, "sm_scale must be a Python number (it is compiled in), got '1' of type str"),
    (decode, {"sm_scale": np.ones(2)}, TypeError, "sm_scale must be a Python number (it is compiled in), got array([1., 1.])"),
    (decode, {"causal": 1}, TypeError, "causal must be a Python bool (it is compiled in), got 1 of type int"),
    (decode, {"causal": None}, TypeError, "causal must be a Python bool (it is compiled in), got None"),
    (decode, {"implementation": "cuda"}, ValueError, "implementation must be None, \"kernel\" or \"xla\", got 'cuda'"),
    (decode, {"implementation": ["xla"]}, ValueError, "implementation must be None, \"kernel\" or \"xla\", got ['xla']"),
    # schedule
    (decode, {"schedule": i32(5, 2)}, TypeError, "schedule must be a SplitSchedule from make_schedule, got ndarray"),
    (decode, {"schedule": (i32(5, 2), 2)}, TypeError, "schedule must be a SplitSchedule from make_schedule, got tuple"),
    (decode, {"schedule": cuts(5, 2, b=3)}, ValueError, "schedule must be made for q's batch of b = 2 sequences, got one made for b = 3"),
    (decode, {"schedule": cuts(5, 3)}, ValueError, "schedule.cuts must have shape [num_parts + 1, 2] with num_parts >= 1, got shape (5, 3)"),
    (decode, {"schedule": cuts(1, 2)}, ValueError, "schedule.cuts must have shape [num_parts + 1, 2] with num_parts >= 1, got shape (1, 2)"),
    (decode, {"schedule": cuts(20000, 2)}, ValueError, "schedule.cuts must be of at most num_parts = 256, got shape (20000, 2)"),
    (decode, {"schedule": cuts(4, 5, 2)}, ValueError, "schedule.cuts must have rank 2 [num_parts + 1, 2], got shape (4, 5, 2)"),
    (decode, {"schedule": cuts(5, 2, dtype=np.int64)}, TypeError, "schedule.cuts must have dtype int32, got int64"),
    (decode, {"schedule": SplitSchedule(None, b=2)}, TypeError, "schedule.cuts must be an array [num_parts + 1, 2], got None"),
    (decode, {"schedule": SplitSchedule(i32(5, 2), b=2, tile_rows=48)}, ValueError, "schedule.tile_rows must be 16, 32 or 64, got 48"),
    # arrays of others
    (decode, {"q": np.ma.masked_array(zeros(2, 1, 6, 24), mask=False)}, TypeError, "q must be a JAX or NumPy array [b, s_q, h_q, d_qk] without a mask"),
    (decode, {"cache_seqlens": np.ma.masked_array([1, 2])}, TypeError, "cache_seqlens must be a JAX or NumPy array [b] without a mask"),
    (decode, {"q": Foreign()}, TypeError, "q must be a JAX or NumPy array [b, s_q, h_q, d_qk], got torch.Tensor: convert it with jax.dlpack.from_dlpack"),
    (append, {"positions": Foreign()}, TypeError, "positions must be a JAX or NumPy array [b], got torch.Tensor: convert it"),
    # what is long to print, cannot be printed or is no string
    (decode, {"q": [[0.5] * 1000] * 1000}, TypeError, "q must be an array [b, s_q, h_q, d_qk], got [[0.5, 0.5, 0.5, 0.5, 0.5, 0.5, ...], [0.5,"),
    (decode, {"d_v": zeros(2, 64)}, TypeError, "d_v must be a Python int (it is compiled in), got an array bfloat16[2, 64] of type ndarray"),
    (decode, {"causal": donated()}, TypeError, "causal must be a Python bool (it is compiled in), got an array that was donated or deleted"),
    (decode, {"implementation": zeros(2, 64)}, ValueError, "implementation must be None, \"kernel\" or \"xla\", got an array bfloat16[2, 64]"),
    # formats
    (decode, {"format": "v32"}, TypeError, "format must be a CacheFormat or None, got 'v32' of type str"),
    (decode, {"format": CacheFormat(d_qk=24, d_v=16, h_kv=2, block_size=8, row_stride=32)}, ValueError, "blocks must be [num_blocks, 8, 2, 32] in the given format, got shape (5, 8, 2, 24)"),
    (decode, {"format": CacheFormat(name="v4"), "blocks": zeros(5, 37440, dtype=np.uint8)}, ValueError, "format must be dense, v32 or fp8_row for dense_decode, got v4"),
    (decode, {"format": CacheFormat(name="v32"), "blocks": zeros(5, 64, 1, 656)}, TypeError, "blocks must have dtype uint8, got bfloat16"),
    (decode, {"kv_scale": 2.0}, ValueError, 'kv_scale must be None but in format "fp8_row", got one for "dense"'),
    # make_schedule
    (schedule, {"cache_seqlens": i32(2, 2)}, ValueError, "cache_seqlens must have rank 1 [b], got shape (2, 2)"),
    (schedule, {"cache_seqlens": i32(0)}, ValueError, "cache_seqlens [b] must have no empty dimension, got shape (0,)"),
    (schedule, {"cache_seqlens": i32(16385)}, ValueError, "cache_seqlens must have at most b = 16384 sequences, got 16385"),
    (schedule, {"cache_seqlens": zeros(2, dtype=np.float32)}, TypeError, "cache_seqlens must have dtype int32, or another integer's, got float32"),
    (schedule, {"num_parts": 0}, ValueError, "num_parts must be between 1 and 256, got 0"),
    (schedule, {"batch_invariant": 1}, TypeError, "batch_invariant must be a Python bool (it is compiled in), got 1 of type int"),
    (schedule, {"max_seqlen": -1}, ValueError, "max_seqlen must be between 0 and 2147483647, got -1"),
    (schedule, {"max_seqlen": 64.0}, TypeError, "max_seqlen must be a Python int (it is compiled in), got 64.0"),
    (schedule, {"num_parts": 132.0}, TypeError, "num_parts must be a Python int (it is compiled in), got 132.0"),
    (schedule, {"h_q": 0}, ValueError, "h_q must be between 1 and 2147483647, got 0"),
    (schedule, {"h_kv": 4}, ValueError, "h_q must be a multiple of h_kv = 4, got h_q = 6"),
    (schedule, {"s_q": -1}, ValueError, "s_q must be between 1 and 2147483647, got -1"),
    (schedule, {"implementation": "gpu"}, ValueError, "implementation must be None, \"kernel\" or \"xla\", got 'gpu'"),
    # cache_append
    (append, {"blocks": zeros(5, 8, 2)}, ValueError, "blocks must have rank 4 [num_blocks, block_size, h_kv, d_qk], got shape (5, 8, 2)"),
    (append, {"blocks": zeros(5, 8, 2, 24, dtype=np.float64)}, TypeError, "blocks must have dtype bfloat16, float16 or float32, got float64"),
    (append, {"blocks": donated}, ValueError, "blocks must be a live array, got one that was donated or deleted"),
    (append, {"rows": zeros(2, 2, 24)}, ValueError, "rows must have rank 4 [b, s_new, h_kv, d_qk], got shape (2, 2, 24)"),
    (append, {"rows": zeros(2, 3, 2, 23)}, ValueError, "rows must end in blocks' [h_kv, d_qk] = [2, 24], got shape (2, 3, 2, 23)"),
    (append, {"rows": zeros(2, 3, 1, 24)}, ValueError, "rows must end in blocks' [h_kv, d_qk] = [2, 24], got shape (2, 3, 1, 24)"),
    (append, {"rows": zeros(2, 3, 2, 24, dtype=F16)}, TypeError, "rows must have blocks' dtype bfloat16, got float16"),
    (append, {"block_table": i32(3, 3)}, ValueError, "block_table must have one row per sequence, b = 2, got shape (3, 3)"),
    (append, {"positions": i32(3)}, ValueError, "positions must have one entry per sequence, b = 2, got shape (3,)"),
    (append, {"positions": zeros(2, dtype=np.int64) + 2**40}, ValueError, "positions must fit in int32, got 1099511627776"),
    (append, {"positions": 0}, ValueError, "positions must have rank 1 [b], got shape ()"),
    (append, {"num_new": i32(1)}, ValueError, "num_new must have one entry per sequence, b = 2, got shape (1,)"),
    (append, {"num_new": True}, TypeError, "num_new must be an array [b], got True of type bool"),
    (append, {"implementation": "cpu"}, ValueError, "implementation must be None, \"kernel\" or \"xla\", got 'cpu'"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("call", "wrong", "error", "message"),
    WRONG_CALLS,
    ids=[
        f"{call.__name__}-{next(iter(wrong))}-{i}"
        for i, (call, wrong, _, _) in enumerate(WRONG_CALLS)
    ],
)
def test_wrong_call(call: Callable, wrong: dict, error: type[Exception], message: str) -> None:
    if wrong.get("blocks") is donated:
        wrong = {"blocks": donated()}
    with pytest.raises(error, match=re.escape(message)):
        call(**wrong)


@pytest.mark.parametrize("call", [decode, schedule, append])
def test_the_calls_that_they_are_made_from_are_right(call: Callable) -> None:
    jax.block_until_ready(call())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("d_v", "d_v must be a Python int (it is compiled in), got a traced value of"),
        ("causal", "causal must be a Python bool (it is compiled in), got a traced value of"),
        ("sm_scale", "sm_scale must be a Python number (it is compiled in), got a traced value of"),
    ],
)
def test_traced_where_static(name: str, message: str) -> None:
    value = {"d_v": 16, "causal": True, "sm_scale": 0.5}[name]
    with pytest.raises(TypeError, match=re.escape(message)):
        jax.jit(lambda x: decode(**{name: x}))(value)


def test_cache_used_after_it_was_donated() -> None:
    blocks = jnp.zeros((5, 8, 2, 24), jnp.bfloat16)
    jax.jit(lambda x: append(blocks=x), donate_argnums=0)(blocks)
    with pytest.raises(ValueError, match="use the array that the donating call returned"):
        decode(blocks=blocks)


# Hostile values.

CASE = cases.DecodeCase(4, 2, 200, 6)


def junk_cuts() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(cases.SEED)
    low, high = -(2**31), 2**31 - 1
    right = np.asarray(
        make_schedule(np.full(4, 200, I32), h_q=6, num_parts=8, implementation="xla").cuts
    )
    return {
        "random": rng.integers(low, high, (9, 2)),
        "nearly right": right + rng.integers(-1, 2, right.shape),
        "reversed": right[::-1],
        "all the same": np.broadcast_to(right[3], right.shape),
        "lowest": np.full((9, 2), low),
        "highest": np.full((9, 2), high),
        "every part all of it": np.stack([[0, 0], [4, 0]] * 5)[:9],
        "inside and far": np.stack([np.arange(9) % 5, np.full(9, high)], axis=1),
        "negative tiles": np.stack([np.arange(9) // 2, np.full(9, low)], axis=1),
        "zeros": np.zeros((9, 2)),
    }


@pytest.mark.parametrize("kind", junk_cuts())
def test_junk_in_a_schedule(kind: str, kernel: str) -> None:
    """The result is nobody's promise; the process, and the call after it, are."""
    inputs = cases.make_inputs(CASE)
    junk = SplitSchedule(np.ascontiguousarray(junk_cuts()[kind].astype(I32)), b=4)
    out, lse = dense_decode(*inputs.arguments, schedule=junk, implementation=kernel)
    jax.block_until_ready((out, lse))
    assert (out.shape, lse.shape) == ((4, 2, 6, 512), (4, 2, 6))
    out, lse = dense_decode(*inputs.arguments, implementation=kernel)
    expected = cases.naive_decode(CASE, inputs)
    tolerances.assert_decoded((out, lse), expected)


def test_junk_table_and_lengths_stay_within_the_cache(implementation: str) -> None:
    """Wild ids and lengths, with every answer that the contract defines for them."""
    rng = np.random.default_rng(cases.SEED)
    blocks = cases.normal(rng, (7, 64, 1, 576), "bfloat16", cases.ROW_SCALE)
    q = cases.normal(rng, (16, 2, 3, 576), "bfloat16", cases.QUERY_SCALE)
    table = rng.integers(-3, 10, (16, 4)).astype(I32)
    table[3:6] = rng.integers(-(2**31), 2**31 - 1, (3, 4))
    lengths = rng.integers(-10, 400, 16).astype(I32)
    lengths[:4] = [2**31 - 1, -(2**31), 257, 256]
    run = functools.partial(dense_decode, q, blocks, table, lengths, implementation=implementation)
    out, lse = run(causal=True)
    for i in range(16):
        valid = (table[i] >= 0) & (table[i] < 7)
        keys = np.where(valid[:, None, None, None], blocks[np.where(valid, table[i], 0)], 0)
        expected = naive.dense(
            q[i], keys.reshape(256, 1, 576), int(np.clip(lengths[i], 0, 256)), d_v=512, causal=True
        )
        tolerances.assert_decoded((out[i], lse[i]), expected)


def test_junk_in_an_append_stays_within_the_sequences_own_blocks(implementation: str) -> None:
    rng = np.random.default_rng(cases.SEED)
    blocks = cases.normal(rng, (6, 64, 1, 576), "bfloat16")
    rows = cases.normal(rng, (8, 3, 1, 576), "bfloat16")
    table = np.array([[0, 1]] + [[-1, 6], [2**31 - 1, -(2**31)], [2, 3]] + [[4, 5]] * 4, I32)
    positions = np.array([127, 0, 64, -2, 2**31 - 1, -(2**31), 128, 2**31 - 3], I32)
    num_new = np.array([3, 3, 2, 2**31 - 1, 3, 3, 3, -1], I32)
    expected = blocks.copy()
    expected[1, 63] = rows[0, 0]  # its others are past the table
    expected[2, 0] = rows[3, 2]  # its others are before the beginning
    got = cache_append(
        blocks, rows, table, positions, num_new=num_new, implementation=implementation
    )
    np.testing.assert_array_equal(np.asarray(got), expected)
