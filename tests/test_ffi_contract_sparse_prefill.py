"""The C++ side of sparse_prefill by itself refuses calls that would make it read out of bounds."""

import jax.numpy as jnp
import numpy as np
import pytest

from ffi_calls import call, i32, refused, replaced, result, zeros

s_q, h_q, s_kv, d_qk, d_v, topk = 2, 4, 9, 576, 512, 7
pytestmark = pytest.mark.usefixtures("on_cpu")


def sparse_prefill(**wrong):
    operands = {
        "q": zeros(s_q, h_q, d_qk),
        "kv": zeros(s_kv, 1, d_qk),
        "indices": i32(s_q, topk) - 1,
        "topk_length": i32(s_q) + topk,
        "attn_sink": zeros(h_q, dtype=jnp.float32),
    }
    results = {
        "out": result(s_q, h_q, d_v, dtype=jnp.bfloat16),
        "lse": result(s_q, h_q),
        "max_logits": result(s_q, h_q),
    }
    attributes = {"sm_scale": np.float32(0.04)}
    return call("sparse_prefill", *replaced(wrong, operands, results, attributes))


def test_the_good_call_is_taken():
    out, lse, max_logits = sparse_prefill()
    np.testing.assert_array_equal(out.astype(jnp.float32), 0)
    np.testing.assert_array_equal(lse, -np.inf)
    np.testing.assert_array_equal(max_logits, -np.inf)


WRONG = {
    "q of rank 2": ({"q": zeros(h_q, d_qk)}, r"q must have shape \[s_q, h_q, d_qk\]"),
    "q in s32": ({"q": zeros(s_q, h_q, d_qk, dtype=jnp.int32)}, "q must be bf16, f16 or f32"),
    "two KV heads": ({"kv": zeros(s_kv, 2, d_qk)}, r"kv must have shape \[.*\], got \[9, 2, 576\]"),
    "narrow kv": ({"kv": zeros(s_kv, 1, d_qk - 8)}, r"kv must have shape \[.*got \[9, 1, 568\]"),
    "kv in another type": (
        {"kv": zeros(s_kv, 1, d_qk, dtype=jnp.float16)},
        "kv must have the element type of q",
    ),
    "indices of more queries": (
        {"indices": i32(s_q + 1, topk)},
        r"indices must have shape \[s_q=2, topk=7\], got \[3, 7\]",
    ),
    "no index": ({"indices": i32(s_q, 0)}, "indices must have shape.*at least 1"),
    "short topk_length": ({"topk_length": i32(1)}, r"topk_length must have shape \[s_q=2\]"),
    "fewer sinks": ({"attn_sink": zeros(3, dtype=jnp.float32)}, r"attn_sink must have shape \[h_q"),
    "values wider than keys": (
        {"out": result(s_q, h_q, d_qk + 1, dtype=jnp.bfloat16)},
        "d_v must be at most d_qk, got d_v=577 and d_qk=576",
    ),
    "out in another type": (
        {"out": result(s_q, h_q, d_v, dtype=jnp.float16)},
        "out must have the element type of q",
    ),
    "out for fewer heads": (
        {"out": result(s_q, h_q - 1, d_v, dtype=jnp.bfloat16)},
        r"out must have shape \[s_q=2, h_q=4, d_v=512\], got \[2, 3, 512\]",
    ),
    "short lse": ({"lse": result(s_q, h_q - 1)}, r"lse must have shape \[s_q=2, h_q=4\]"),
    "short max_logits": ({"max_logits": result(1, h_q)}, r"max_logits must have shape \[s_q=2"),
    "a superfluous attribute": ({"causal": True}, "expected 1 attributes but got 2"),
}


@pytest.mark.parametrize(("wrong", "match"), WRONG.values(), ids=WRONG)
def test_sparse_prefill_refuses(wrong, match):
    refused(sparse_prefill, match, **wrong)
