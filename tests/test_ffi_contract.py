"""The C++ side by itself refuses calls that would make it read or write out of bounds.

Every call here goes to the FFI target, past the package's own checks: first a good one, then the
same with one operand, result or attribute wrong.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffi_calls import call, i32, refused, replaced, result, zeros

b, s_q, h_q, h_kv, d_qk, d_v = 2, 1, 4, 2, 576, 512
num_blocks, block_size, max_blocks, num_parts, s_new = 5, 64, 3, 6, 2


@pytest.fixture(params=["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request):
    with jax.default_device(jax.devices(request.param)[0]):
        yield request.param


def make_schedule(**wrong):
    operands = {"cache_seqlens": i32(b)}
    results = {"cuts": result(num_parts + 1, 2, dtype=jnp.int32)}
    return call("make_schedule", *replaced(wrong, operands, results, {}))


def dense_decode(**wrong):
    operands = {
        "q": zeros(b, s_q, h_q, d_qk),
        "blocks": zeros(num_blocks, block_size, h_kv, d_qk),
        "block_table": i32(b, max_blocks),
        "cache_seqlens": i32(b),
        "seen": i32(b, 1),
        "cuts": np.array([[0, 0]] * num_parts + [[b, 0]], np.int32),  # all in the last part
        "kv_scale": np.float32(1),
    }
    results = {
        "out": result(b, s_q, h_q, d_v, dtype=jnp.bfloat16),
        "lse": result(b, s_q, h_q),
        "out_accum": result(2 * num_parts, s_q, h_q, d_v),
        "lse_accum": result(2 * num_parts, s_q, h_q),
    }
    attributes = {
        "sm_scale": np.float32(0.04),
        "causal": False,
        "format": np.int32(0),
        "block_size": np.int32(block_size),
        "h_kv": np.int32(h_kv),
        "tile_rows": np.int32(64),
    }
    return call("dense_decode", *replaced(wrong, operands, results, attributes))


def cache_append(aliases=((0, 0),), **wrong):
    operands = {
        "blocks": zeros(num_blocks, block_size, h_kv, d_qk),
        "rows": zeros(b, s_new, h_kv, d_qk),
        "block_table": i32(b, max_blocks),
        "positions": i32(b),
        "num_new": i32(b),
        "kv_scale": np.float32(1),
    }
    attributes = {"format": np.int32(0), "block_size": np.int32(block_size)}
    updated = wrong.get("updated", wrong.get("blocks", operands["blocks"]))
    results = {"updated": result(*updated.shape, dtype=updated.dtype)}
    return call(
        "cache_append",
        *replaced(wrong, operands, results, attributes),
        input_output_aliases=dict(aliases),
    )


def test_the_good_calls_are_taken(device):
    """With lengths of 0 there is nothing to split, to attend to or to write."""
    (cuts,) = make_schedule()
    np.testing.assert_array_equal(cuts[:, 1], 0)
    np.testing.assert_array_equal(cuts[-1], [b, 0])
    out, lse, *_ = dense_decode()
    np.testing.assert_array_equal(out.astype(jnp.float32), 0)
    np.testing.assert_array_equal(lse, -np.inf)
    (blocks,) = cache_append(rows=zeros(b, s_new, h_kv, d_qk) + 1)
    np.testing.assert_array_equal(blocks.astype(jnp.float32), 0)


def test_a_result_of_its_own_gets_a_copy_first(device):
    """XLA may fuse the operation with the slices around it, and undo the aliasing."""
    blocks = zeros(num_blocks, block_size, h_kv, d_qk) + 2
    rows = zeros(b, s_new, h_kv, d_qk) + 1
    (updated,) = cache_append(blocks=blocks, rows=rows, num_new=i32(b) + 1, aliases=())
    expected = np.full(updated.shape, 2)
    expected[0, 0] = 1  # every sequence's position 0 of block 0
    np.testing.assert_array_equal(updated.astype(jnp.float32), expected)
    np.testing.assert_array_equal(blocks.astype(jnp.float32), 2)


MAKE_SCHEDULE = {
    "cache_seqlens of rank 2": ({"cache_seqlens": i32(b, 1)}, "rank"),
    "cache_seqlens of int16": (
        {"cache_seqlens": zeros(b, dtype=jnp.int16)},
        "dtype: expected S32",
    ),
    "no sequence": ({"cache_seqlens": i32(0)}, r"cache_seqlens must have shape \[b\]"),
    "too many sequences": ({"cache_seqlens": i32(16385)}, "b must be at most 16384"),
    "no part": (
        {"cuts": result(1, 2, dtype=jnp.int32)},
        r"cuts must have shape \[num_parts \+ 1, 2\].*got \[1, 2\]",
    ),
    "three numbers a cut": (
        {"cuts": result(7, 3, dtype=jnp.int32)},
        r"cuts must have shape.*got \[7, 3\]",
    ),
    "float cuts": ({"cuts": result(7, 2)}, "dtype: expected S32 but got F32"),
}

DENSE_DECODE = {
    "q of rank 3": ({"q": zeros(b, h_q, d_qk)}, r"q must have shape \[b, s_q, h_q, d_qk\]"),
    "q without rows": ({"q": zeros(b, 0, h_q, d_qk)}, "q must have shape.*at least 1"),
    "q in s32": (
        {"q": zeros(b, s_q, h_q, d_qk, dtype=jnp.int32)},
        "q must be bf16, f16 or f32",
    ),
    "q in f16, blocks in bf16": (
        {"q": zeros(b, s_q, h_q, d_qk, dtype=jnp.float16)},
        "blocks must have the element type of q",
    ),
    "q for more sequences": (
        {"q": zeros(b + 1, s_q, h_q, d_qk)},
        r"block_table must have shape \[b=3, max_blocks=3\], got \[2, 3\]",
    ),
    "heads that do not divide": (
        {"q": zeros(b, s_q, 3, d_qk)},
        "h_q must be a multiple of h_kv, got h_q=3 and h_kv=2",
    ),
    "wide q": (
        {"q": zeros(b, s_q, h_q, d_qk + 8)},
        "blocks must have rows of q's d_qk=584 or wider, got 576",
    ),
    "blocks of rank 3": (
        {"blocks": zeros(num_blocks, block_size, d_qk)},
        r"blocks must have shape \[num_blocks",
    ),
    "no block": ({"blocks": zeros(0, block_size, h_kv, d_qk)}, "blocks must.*at least 1"),
    "block_table of rank 1": ({"block_table": i32(b * max_blocks)}, "rank: expected 2"),
    "block_table of a larger batch": (
        {"block_table": i32(b + 1, max_blocks)},
        r"block_table must have shape \[b=2, max_blocks=3\], got \[3, 3\]",
    ),
    "float block_table": (
        {"block_table": zeros(b, max_blocks, dtype=jnp.float32)},
        "dtype: expected S32 but got F32",
    ),
    "fewer lengths": (
        {"cache_seqlens": i32(b - 1)},
        r"cache_seqlens must have shape \[b=2\], got \[1\]",
    ),
    "more lengths": (
        {"cache_seqlens": i32(b + 1)},
        r"cache_seqlens must have shape \[b=2\], got \[3\]",
    ),
    "what more queries see": (
        {"seen": i32(b, s_q + 1)},
        r"seen must have shape \[b=2, s_q or 1=1\], got \[2, 2\]",
    ),
    "what fewer sequences see": ({"seen": i32(b - 1, 1)}, r"seen must have shape \[b=2"),
    "cuts without a part": ({"cuts": i32(1, 2)}, "cuts must have shape"),
    "cuts of another schedule": (
        {"cuts": i32(num_parts + 2, 2)},
        r"out_accum must have shape \[2 \* num_parts=14.*got \[12",
    ),
    "cuts of one column": ({"cuts": i32(num_parts + 1, 1)}, "cuts must have shape"),
    "values wider than keys": (
        {"out": result(b, s_q, h_q, d_qk + 1, dtype=jnp.bfloat16)},
        "d_v must be at most d_qk, got d_v=577 and d_qk=576",
    ),
    "out for fewer heads": (
        {"out": result(b, s_q, h_q - 1, d_v, dtype=jnp.bfloat16)},
        r"out must have shape \[b=2, s_q=1, h_q=4, d_v=512\], got \[2, 1, 3, 512\]",
    ),
    "out in another type": (
        {"out": result(b, s_q, h_q, d_v, dtype=jnp.float16)},
        "out must have the element type of q",
    ),
    "short lse": (
        {"lse": result(b, s_q, h_q - 1)},
        r"lse must have shape \[b=2, s_q=1, h_q=4\]",
    ),
    "lse in bf16": (
        {"lse": result(b, s_q, h_q, dtype=jnp.bfloat16)},
        "dtype: expected F32",
    ),
    "half the workspace": (
        {"out_accum": result(num_parts, s_q, h_q, d_v)},
        r"out_accum must have shape \[2 \* num_parts=12",
    ),
    "narrow workspace": (
        {"out_accum": result(2 * num_parts, s_q, h_q, d_v - 1)},
        r"out_accum must have shape .*d_v=512\], got \[12, 1, 4, 511\]",
    ),
    "half the lse workspace": (
        {"lse_accum": result(num_parts, s_q, h_q)},
        r"lse_accum must have shape \[2 \* num_parts=12",
    ),
    "an unknown format": ({"format": np.int32(8)}, "format must be between 0 and 7"),
    "another format's blocks": ({"format": np.int32(1)}, "blocks must be uint8"),
    "v32 blocks of other rows": (
        {
            "format": np.int32(1),
            "blocks": zeros(num_blocks, block_size, 1, 655, dtype=jnp.uint8),
        },
        r"blocks must have shape \[.*bytes=656\], got \[5, 64, 1, 655\]",
    ),
    "another block_size": (
        {"block_size": np.int32(48)},
        "blocks must hold whole blocks of block_size=48 tokens with h_kv=2 rows each",
    ),
    "another h_kv": ({"h_kv": np.int32(3)}, "blocks must hold whole blocks .* with h_kv=3 rows"),
    "a negative h_kv": ({"h_kv": np.int32(-1)}, "blocks must hold whole .* with h_kv=-1 rows"),
    "a kv_scale of rank 1": ({"kv_scale": np.ones(1, np.float32)}, "rank: expected 0"),
    "no sm_scale": ({"sm_scale": None}, "expected 6 attributes but got 5"),
    "sm_scale in double precision": ({"sm_scale": 0.04}, "F32"),
    "causal as an integer": ({"causal": 1}, "(PRED|bool)"),
    "a misspelt attribute": ({"causal": None, "casual": True}, "causal"),
    "a superfluous attribute": ({"scale": np.float32(1)}, "expected 6 attributes but got 7"),
}

CACHE_APPEND = {
    "v4 blocks without padding": (
        {
            "format": np.int32(3),
            "blocks": zeros(num_blocks, 64 * 584, dtype=jnp.uint8),
            "rows": zeros(b, s_new, 1, 512),
        },
        r"blocks must have shape \[num_blocks=5, block_bytes=37440\], got \[5, 37376\]",
    ),
    "blocks of rank 2": ({"blocks": zeros(num_blocks, d_qk)}, "blocks must have shape"),
    "blocks in s32": (
        {"blocks": zeros(num_blocks, block_size, h_kv, d_qk, dtype=jnp.int32)},
        "blocks must be bf16, f16 or f32",
    ),
    "rows of rank 3": ({"rows": zeros(b, h_kv, d_qk)}, "rows must have shape"),
    "rows for more heads": (
        {"rows": zeros(b, s_new, h_kv + 1, d_qk)},
        r"blocks must hold whole blocks of block_size=64 tokens with h_kv=3 rows each, got \[5, ",
    ),
    "wide rows": (
        {"rows": zeros(b, s_new, h_kv, d_qk + 8)},
        r"rows must end in .* got \[2, 2, 2, 584\]",
    ),
    "rows in another type": (
        {"rows": zeros(b, s_new, h_kv, d_qk, dtype=jnp.float16)},
        "rows must have the element type of blocks",
    ),
    "a short block_table": (
        {"block_table": i32(b - 1, max_blocks)},
        r"block_table must have shape \[b=2, max_blocks=3\], got \[1, 3\]",
    ),
    "fewer positions": ({"positions": i32(b - 1)}, r"positions must have shape \[b=2\]"),
    "scalar num_new": ({"num_new": i32()}, "rank: expected 1"),
    "more num_new": ({"num_new": i32(b + 1)}, r"num_new must have shape \[b=2\], got \[3\]"),
    "a smaller result": (
        {
            "updated": result(num_blocks - 1, block_size, h_kv, d_qk, dtype=jnp.bfloat16),
            "aliases": (),
        },
        r"the result must have blocks' shape \[5.*got \[4",
    ),
}


@pytest.mark.parametrize(("wrong", "match"), MAKE_SCHEDULE.values(), ids=MAKE_SCHEDULE)
def test_make_schedule_refuses(device, wrong, match):
    refused(make_schedule, match, **wrong)


@pytest.mark.parametrize(("wrong", "match"), DENSE_DECODE.values(), ids=DENSE_DECODE)
def test_dense_decode_refuses(device, wrong, match):
    refused(dense_decode, match, **wrong)


@pytest.mark.parametrize(("wrong", "match"), CACHE_APPEND.values(), ids=CACHE_APPEND)
def test_cache_append_refuses(device, wrong, match):
    refused(cache_append, match, **wrong)


def test_a_table_beyond_31_bits_of_tokens_is_refused(device):
    refused(
        dense_decode,
        r"max_blocks \* block_size \(tokens\) must be less than 2\^31, got 2147483648",
        blocks=zeros(1, 2**16, h_kv, 8),
        block_size=np.int32(2**16),
        q=zeros(1, s_q, h_q, 8),
        block_table=i32(1, 2**15),
        cache_seqlens=i32(1),
        seen=i32(1, 1),
        out=result(1, s_q, h_q, 8, dtype=jnp.bfloat16),
        lse=result(1, s_q, h_q),
        out_accum=result(2 * num_parts, s_q, h_q, 8),
    )


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"q": (b, s_q, h_q, 512), "blocks": (num_blocks, 64, h_kv, 512)}, "d_qk"),
        ({"blocks": (num_blocks, 48, h_kv, d_qk)}, "block_size"),
    ],
)
def test_the_hopper_kernel_refuses_other_dimensions(changes, match):
    with jax.default_device(jax.devices("gpu")[0]):
        refused(dense_decode, match, **{name: zeros(*shape) for name, shape in changes.items()})
