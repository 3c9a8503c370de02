# ruff: noqa: E501 (one wrong call a line)
"""Wrong calls of sparse_decode get an error that names the argument, what was expected and what came."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jax_flashmla import CacheFormat, SplitSchedule, make_schedule, sparse_decode

pytestmark = pytest.mark.usefixtures("on_cpu")

BF16, F16, F32, I32, U8 = ml_dtypes.bfloat16, np.float16, np.float32, np.int32, np.uint8


def zeros(*shape: int, dtype: Any = BF16) -> np.ndarray:
    return np.zeros(shape, dtype)


def i32(*shape: int) -> np.ndarray:
    return zeros(*shape, dtype=I32)


def struct(*shape: int, dtype: Any = BF16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def blocks_of(name: str) -> dict[str, Any]:
    format = CacheFormat(name=name, block_size=64)
    return {"blocks": zeros(2, *format.block_shape, dtype=U8), "format": format}


def extra_of(name: str) -> dict[str, Any]:
    return {f"extra_{k}": v for k, v in blocks_of(name).items()} | {"extra_indices": i32(2, 1, 3)}


EXTRA = {"extra_blocks": zeros(3, 4, 1, 24), "extra_indices": i32(2, 1, 5)}
WIDE_Q = {"q": zeros(2, 1, 6, 512), "d_v": 512}
V4 = {**WIDE_Q, **blocks_of("v4")}


def decode(**wrong: Any) -> Any:
    """sparse_decode of b = 2, s_q = 1, h_q = 6, d_qk = 24, d_v = 16, topk = 7, but for `wrong`."""
    right = {"q": zeros(2, 1, 6, 24), "blocks": zeros(5, 8, 1, 24), "indices": i32(2, 1, 7)}
    return sparse_decode(**{**right, "d_v": 16, **wrong})


WRONG_CALLS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"q": zeros(2, 6, 24)}, ValueError, "q must have rank 4 [b, s_q, h_q, d_qk], got shape (2, 6, 24)"),
    ({"q": zeros(2, 1, 6, 24, dtype=np.int8)}, TypeError, "q must have dtype bfloat16, float16 or float32, got int8"),
    ({"q": struct(2, 2**15, 2**15, 24)}, ValueError, "q must have less than 2^31 rows b * s_q * h_q"),
    ({"q": zeros(2, 1, 6, 24, dtype=F16)}, TypeError, "blocks must have q's dtype float16, got bfloat16"),
    ({"d_v": 25}, ValueError, "d_v must be at most d_qk = 24 (a value is a row's first d_v columns), got 25"),
    ({"d_v": 0}, ValueError, "d_v must be between 1 and 2147483647, got 0"),
    # blocks and formats
    ({"blocks": zeros(5, 8, 2, 24)}, ValueError, "blocks must have h_kv = 1 for sparse_decode, got 2"),
    ({"blocks": zeros(5, 8, 24)}, ValueError, "blocks must have rank 4 [num_blocks, block_size, h_kv, d_qk], got shape (5, 8, 24)"),
    ({"blocks": zeros(5, 8, 1, 20)}, ValueError, "blocks must have rows of q's d_qk = 24, got 20 in shape (5, 8, 1, 20)"),
    ({"blocks": zeros(5, 8, 1, 656, dtype=U8)}, TypeError, "format must be given for blocks of uint8"),
    ({"format": "v32"}, TypeError, "format must be a CacheFormat or None, got 'v32' of type str"),
    ({**V4, "blocks": zeros(2, 64 * 584, dtype=U8)}, ValueError, "blocks must be [num_blocks, 37440] in the given format, got shape (2, 37376)"),
    ({**WIDE_Q, **blocks_of("v41_fp4")}, ValueError, "format must be dense, v32, v32_nope, v4, v41 or fp8_row for sparse_decode, got v41_fp4"),
    ({**blocks_of("fp8_index"), "q": zeros(2, 1, 6, 128)}, ValueError, "for sparse_decode, got fp8_index"),
    ({**WIDE_Q, **blocks_of("v32")}, ValueError, "blocks must have rows of q's d_qk = 512, got 576"),
    ({"kv_scale": 0.5}, ValueError, 'kv_scale must be None but in format "fp8_row", got one for "dense"'),
    # indices and lengths
    ({"indices": i32(2, 7)}, ValueError, "indices must have rank 3 [b, s_q, topk], got shape (2, 7)"),
    ({"indices": i32(2, 1, 0)}, ValueError, "indices [b, s_q, topk] must have no empty dimension, got shape (2, 1, 0)"),
    ({"indices": i32(3, 1, 7)}, ValueError, "indices must be [b, s_q, topk] with q's b = 2 and s_q = 1, got shape (3, 1, 7)"),
    ({"indices": i32(2, 2, 7)}, ValueError, "indices must be [b, s_q, topk] with q's b = 2 and s_q = 1, got shape (2, 2, 7)"),
    ({"indices": zeros(2, 1, 7, dtype=F32)}, TypeError, "indices must have dtype int32, or another integer's, got float32"),
    ({"indices": np.full((2, 1, 7), 2**31)}, ValueError, "indices must fit in int32, got 2147483648"),
    ({"indices": None}, TypeError, "indices must be an array [b, s_q, topk], got None of type NoneType"),
    ({"topk_length": i32(3)}, ValueError, "topk_length must have one entry per sequence, b = 2, got shape (3,)"),
    ({"topk_length": i32(2, 2)}, ValueError, "topk_length must be [b] or [b, s_q] with q's b = 2 and s_q = 1, got shape (2, 2)"),
    ({"topk_length": i32(2, 1, 1)}, ValueError, "topk_length must have rank 1 [b], got shape (2, 1, 1)"),
    ({"topk_length": 7}, ValueError, "topk_length must have rank 1 [b], got shape ()"),
    ({"topk_length": zeros(2, dtype=F32)}, TypeError, "topk_length must have dtype int32, or another integer's, got float32"),
    # sinks
    ({"attn_sink": zeros(5, dtype=F32)}, ValueError, "attn_sink must have one entry per head, h_q = 6, got shape (5,)"),
    ({"attn_sink": zeros(6, dtype=np.float64)}, TypeError, "attn_sink must have dtype float32, got float64"),
    ({"attn_sink": zeros(1, 6, dtype=F32)}, ValueError, "attn_sink must have rank 1 [h_q], got shape (1, 6)"),
    ({"attn_sink": 0.5}, TypeError, "attn_sink must be an array [h_q], got 0.5 of type float"),
    # layers
    ({"first_block": 1}, ValueError, "first_block must be between 0 and 0, got 1"),
    ({"first_block": 4, "layer_blocks": 2}, ValueError, "first_block must be between 0 and 3, got 4"),
    ({"first_block": -1, "layer_blocks": 2}, ValueError, "first_block must be between 0 and 3, got -1"),
    ({"first_block": 1.0, "layer_blocks": 2}, TypeError, "first_block must be an array [], got 1.0 of type float"),
    ({"first_block": True, "layer_blocks": 2}, TypeError, "first_block must be an integer scalar, got True"),
    ({"first_block": i32(2), "layer_blocks": 2}, ValueError, "first_block must have rank 0 [], got shape (2,)"),
    ({"layer_blocks": 6}, ValueError, "layer_blocks must be between 1 and 5, got 6"),
    ({"layer_blocks": 0}, ValueError, "layer_blocks must be between 1 and 5, got 0"),
    ({"layer_blocks": np.float32(2)}, TypeError, "layer_blocks must be a Python int (it is compiled in)"),
    ({"blocks": struct(2**16, 2**15, 1, 24)}, ValueError, "layer_blocks * block_size must be at most 2^31 - 1 slots, got 65536 * 32768"),
    # the extra cache
    ({"extra_blocks": zeros(3, 4, 1, 24)}, TypeError, "extra_indices must be an array [b, s_q, topk], got None of type NoneType"),
    ({"extra_indices": i32(2, 1, 5)}, ValueError, "extra_indices must be None without extra_blocks, got a ndarray"),
    ({"extra_topk_length": i32(2)}, ValueError, "extra_topk_length must be None without extra_blocks"),
    ({"extra_layer_blocks": 2}, ValueError, "extra_layer_blocks must be None without extra_blocks"),
    ({"extra_first_block": 2}, ValueError, "extra_first_block must be 0 without extra_blocks, got 2"),
    ({"extra_format": CacheFormat(name="v4")}, ValueError, "extra_format must be None without extra_blocks"),
    ({**EXTRA, "extra_blocks": zeros(3, 4, 1, 20)}, ValueError, "extra_blocks must have rows of q's d_qk = 24, got 20"),
    ({**EXTRA, "extra_blocks": zeros(3, 4, 2, 24)}, ValueError, "extra_blocks must have h_kv = 1 for sparse_decode, got 2"),
    ({**EXTRA, "extra_blocks": zeros(3, 4, 1, 24, dtype=F16)}, TypeError, "extra_blocks must have q's dtype bfloat16, got float16"),
    ({**EXTRA, "extra_blocks": zeros(3, 584, dtype=U8)}, TypeError, "extra_format must be given for extra_blocks of uint8"),
    ({**EXTRA, "extra_format": 1}, TypeError, "extra_format must be a CacheFormat or None, got 1 of type int"),
    ({**EXTRA, "extra_indices": i32(2, 2, 5)}, ValueError, "extra_indices must be [b, s_q, topk] with q's b = 2 and s_q = 1, got shape (2, 2, 5)"),
    ({**EXTRA, "extra_topk_length": i32(1)}, ValueError, "extra_topk_length must have one entry per sequence, b = 2, got shape (1,)"),
    ({**EXTRA, "extra_first_block": 1}, ValueError, "extra_first_block must be between 0 and 0, got 1"),
    ({**EXTRA, "extra_layer_blocks": 4}, ValueError, "extra_layer_blocks must be between 1 and 3, got 4"),
    ({**V4, **extra_of("v41")}, ValueError, "format and extra_format must be dense + dense, v4 + v4, v41 + v41 or v41 + v41_fp4, got v4 + v41"),
    ({**V4, **extra_of("v41_fp4")}, ValueError, "got v4 + v41_fp4"),
    ({**WIDE_Q, **blocks_of("v32_nope"), **extra_of("v32_nope")}, ValueError, "got v32_nope + v32_nope"),
    # the rest
    ({"sm_scale": -1.0}, ValueError, "sm_scale must be finite and positive in float32, got -1.0"),
    ({"implementation": "cuda"}, ValueError, 'implementation must be None, "kernel" or "xla", got \'cuda\''),
    ({"schedule": i32(3, 2)}, TypeError, "schedule must be a SplitSchedule from make_schedule, got ndarray"),
    ({"schedule": SplitSchedule(i32(3, 2), b=3)}, ValueError, "schedule must be made for q's b * s_q = 2 query tokens, got one made for b = 3"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    WRONG_CALLS,
    ids=[f"{i}-{'-'.join(wrong)}" for i, (wrong, _, _) in enumerate(WRONG_CALLS)],
)
def test_wrong_call(wrong: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        decode(**wrong)


def test_the_calls_that_they_are_made_from_are_right() -> None:
    calls = [{}, EXTRA, V4, {**V4, **extra_of("v4")}, {"extra_first_block": np.int64(0)}]
    for call in calls:
        out, lse = jax.eval_shape(lambda: decode(**call))  # noqa: B023 (called at once)
        assert (out.dtype, lse.shape) == (BF16, (2, 1, 6))
    out, _ = decode(schedule=make_schedule(np.array([64, 64]), h_q=6), topk_length=[7, 2])
    assert out.shape == (2, 1, 6, 16)


def test_traced_where_static() -> None:
    with pytest.raises(TypeError, match=r"layer_blocks must be a Python int .* got a traced value"):
        jax.jit(lambda n: decode(layer_blocks=n))(3)
    with pytest.raises(TypeError, match=r"first_block must have dtype int32, .* got float32"):
        jax.jit(lambda x: decode(first_block=x))(jnp.float32(0))
