"""The C++ side of sparse_decode by itself refuses calls that would make it read out of bounds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffi_calls import call, i32, refused, replaced, result, zeros

b, s_q, h_q, d_qk, d_v = 2, 1, 4, 576, 512
num_blocks, block_size, num_parts, topk = 5, 64, 6, 7


@pytest.fixture(params=["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request):
    with jax.default_device(jax.devices(request.param)[0]):
        yield request.param


def sparse_decode(**wrong):
    """Without a row to attend, over v32 blocks; with has_extra over 16-bit ones, as both caches."""
    extra = wrong.get("has_extra", False)
    stored = zeros(num_blocks, block_size, 1, d_qk if extra else 656)
    stored = stored if extra else stored.astype(np.uint8)
    operands = {
        "q": zeros(b, s_q, h_q, d_qk),
        "blocks": stored,
        "indices": i32(b, s_q, topk) - 1,
        "topk_length": i32(b, s_q) + topk,
        "first_block": np.int32(0),
        "extra_blocks": stored,
        "extra_indices": i32(b, s_q, topk) - 1,
        "extra_topk_length": i32(b, s_q) + topk,
        "extra_first_block": np.int32(0),
        "attn_sink": zeros(h_q, dtype=jnp.float32),
        "kv_scale": np.float32(1),
        "cuts": np.array([[0, 0]] * num_parts + [[b * s_q, 0]], np.int32),
    }
    results = {
        "out": result(b, s_q, h_q, d_v, dtype=jnp.bfloat16),
        "lse": result(b, s_q, h_q),
        "out_accum": result(2 * num_parts, h_q, d_v),
        "lse_accum": result(2 * num_parts, h_q),
    }
    attributes = {
        "sm_scale": np.float32(0.04),
        "format": np.int32(0 if extra else 1),
        "block_size": np.int32(block_size),
        "layer_blocks": np.int32(num_blocks),
        "has_extra": False,
        "extra_format": np.int32(0),
        "extra_block_size": np.int32(block_size),
        "extra_layer_blocks": np.int32(num_blocks),
    }
    return call("sparse_decode", *replaced(wrong, operands, results, attributes))


def test_the_good_call_is_taken(device):
    out, lse, *_ = sparse_decode()
    np.testing.assert_array_equal(out.astype(jnp.float32), 0)
    np.testing.assert_array_equal(lse, -np.inf)


WITH_EXTRA = {"has_extra": True}

SPARSE_DECODE = {
    "q of rank 3": ({"q": zeros(b, h_q, d_qk)}, r"q must have shape \[b, s_q, h_q, d_qk\]"),
    "q in s32": ({"q": zeros(b, s_q, h_q, d_qk, dtype=jnp.int32)}, "q must be bf16, f16 or f32"),
    "wide q": (
        {"q": zeros(b, s_q, h_q, d_qk + 8)},
        "blocks must have rows of q's d_qk=584, got 576",
    ),
    "q for more sequences": (
        {"q": zeros(b + 1, s_q, h_q, d_qk)},
        r"indices must have shape \[b=3, s_q=1, topk=7\], got \[2, 1, 7\]",
    ),
    "blocks in bf16": (
        {"blocks": zeros(num_blocks, block_size, 1, 656)},
        "blocks must be uint8, the bytes of their format",
    ),
    "another block_size": ({"block_size": np.int32(32)}, r"blocks must have shape .*block_size=32"),
    "an unknown format": ({"format": np.int32(-1)}, "format must be between 0 and 7"),
    "two KV heads": (
        {"format": np.int32(0), "blocks": zeros(num_blocks, block_size, 2, d_qk)},
        "blocks must have h_kv=1, got 2",
    ),
    "dense blocks in another type": (
        {"format": np.int32(0), "blocks": zeros(num_blocks, 64, 1, d_qk, dtype=jnp.float16)},
        "blocks must have the element type of q",
    ),
    "a layer beyond the array": (
        {"layer_blocks": np.int32(num_blocks + 1)},
        "blocks must have at least layer_blocks=6 blocks, and that at least 1, got 5",
    ),
    "no layer": ({"layer_blocks": np.int32(0)}, "layer_blocks=0 blocks"),
    "indices of rank 2": ({"indices": i32(b, topk)}, "rank: expected 3"),
    "float indices": ({"indices": zeros(b, s_q, topk, dtype=jnp.float32)}, "expected S32"),
    "no index": ({"indices": i32(b, s_q, 0)}, "indices must have shape.*at least 1"),
    "indices of more queries": (
        {"indices": i32(b, s_q + 1, topk)},
        r"indices must have shape \[b=2, s_q=1, topk=7\], got \[2, 2, 7\]",
    ),
    "short topk_length": (
        {"topk_length": i32(b - 1, s_q)},
        r"topk_length must have shape \[b=2, s_q=1\], got \[1, 1\]",
    ),
    "first_block of rank 1": ({"first_block": i32(1)}, "rank: expected 0"),
    "fewer sinks": (
        {"attn_sink": zeros(h_q - 1, dtype=jnp.float32)},
        r"attn_sink must have shape \[h_q=4\], got \[3\]",
    ),
    "sinks in bf16": ({"attn_sink": zeros(h_q)}, "dtype: expected F32"),
    "extra rows of other width": (
        {**WITH_EXTRA, "extra_blocks": zeros(num_blocks, block_size, 1, d_qk - 8)},
        "extra_blocks must have rows of q's d_qk=576 or wider, got 568",
    ),
    "extra blocks of rank 3": (
        {**WITH_EXTRA, "extra_blocks": zeros(num_blocks, block_size, d_qk)},
        "extra_blocks must have shape",
    ),
    "an unknown extra format": ({**WITH_EXTRA, "extra_format": np.int32(8)}, "format must be"),
    "extra indices of fewer queries": (
        {**WITH_EXTRA, "extra_indices": i32(b - 1, s_q, topk)},
        r"extra_indices must have shape \[b=2, s_q=1, topk=7\], got \[1, 1, 7\]",
    ),
    "long extra_topk_length": (
        {**WITH_EXTRA, "extra_topk_length": i32(b, s_q + 1)},
        r"extra_topk_length must have shape \[b=2, s_q=1\], got \[2, 2\]",
    ),
    "an extra layer beyond the array": (
        {**WITH_EXTRA, "extra_layer_blocks": np.int32(num_blocks + 1)},
        "extra_blocks must have at least layer_blocks=6",
    ),
    "cuts without a part": ({"cuts": i32(1, 2)}, "cuts must have shape"),
    "cuts of another schedule": (
        {"cuts": i32(num_parts + 2, 2)},
        r"out_accum must have shape \[2 \* num_parts=14.*got \[12",
    ),
    "values wider than keys": (
        {"out": result(b, s_q, h_q, d_qk + 1, dtype=jnp.bfloat16)},
        "d_v must be at most d_qk, got d_v=577 and d_qk=576",
    ),
    "out in another type": (
        {"out": result(b, s_q, h_q, d_v, dtype=jnp.float16)},
        "out must have the element type of q",
    ),
    "out for fewer heads": (
        {"out": result(b, s_q, h_q - 1, d_v, dtype=jnp.bfloat16)},
        r"out must have shape \[b=2, s_q=1, h_q=4, d_v=512\], got \[2, 1, 3, 512\]",
    ),
    "short lse": ({"lse": result(b, s_q, h_q - 1)}, r"lse must have shape \[b=2, s_q=1, h_q=4\]"),
    "narrow workspace": (
        {"out_accum": result(2 * num_parts, h_q, d_v - 1)},
        r"out_accum must have shape .*d_v=512\], got \[12, 4, 511\]",
    ),
    "half the lse workspace": (
        {"lse_accum": result(num_parts, h_q)},
        r"lse_accum must have shape \[2 \* num_parts=12",
    ),
    "no layer_blocks": ({"layer_blocks": None}, "expected 8 attributes but got 7"),
    "a superfluous attribute": ({"causal": True}, "expected 8 attributes but got 9"),
}


@pytest.mark.parametrize(("wrong", "match"), SPARSE_DECODE.values(), ids=SPARSE_DECODE)
def test_sparse_decode_refuses(device, wrong, match):
    refused(sparse_decode, match, **wrong)


def test_sparse_decode_takes_an_extra_cache():
    with jax.default_device(jax.devices("cpu")[0]):
        np.testing.assert_array_equal(sparse_decode(**WITH_EXTRA)[1], -np.inf)
