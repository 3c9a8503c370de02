"""The C++ side of a decoding step's operations refuses calls that lead out of bounds."""

import jax.numpy as jnp
import numpy as np
import pytest

from ffi_calls import call, i32, refused, replaced, result, zeros

b, s_new, q_rank, kv_rank, pairs, num_blocks, block_size, max_blocks = 2, 3, 24, 512, 32, 5, 64, 2
heads = 4  # of the indexer
columns, d_qk = q_rank + kv_rank + 2 * pairs, kv_rank + 2 * pairs
rows, groups, k, n = 3, 2, 16, 40
pytestmark = pytest.mark.usefixtures("on_cpu")


def f32(*shape):
    return zeros(*shape, dtype=jnp.float32)


def latent_append(**wrong):
    operands = {
        "blocks": zeros(num_blocks, block_size, 1, d_qk),
        "projected": zeros(b, s_new, columns),
        "q_norm": zeros(q_rank),
        "kv_norm": zeros(kv_rank),
        "cos": f32(b, s_new, pairs),
        "sin": f32(b, s_new, pairs),
        "block_table": i32(b, max_blocks),
        "positions": i32(b),
        "num_new": i32(b),
        "kv_scale": np.float32(1),
    }
    attributes = {
        "format": np.int32(0),
        "block_size": np.int32(block_size),
        "rows_dtype": np.int32(0),
        "layout": np.int32(0),
        "q_eps": np.float32(1e-6),
        "kv_eps": np.float32(1e-6),
        "latent_scale": np.float32(1),
    }
    blocks = wrong.get("blocks", operands["blocks"])
    results = {
        "updated": result(*blocks.shape, dtype=blocks.dtype),
        "q_latent": result(b, s_new, q_rank, dtype=jnp.bfloat16),
    }
    return call("latent_append", *replaced(wrong, operands, results, attributes))


def index_append(**wrong):
    operands = {
        "blocks": zeros(num_blocks, block_size * 132, dtype=jnp.uint8),
        "projected": zeros(b, s_new, columns),
        "k_norm": zeros(128),
        "k_bias": zeros(128),
        "cos": f32(b, s_new, pairs),
        "sin": f32(b, s_new, pairs),
        "q": zeros(b, s_new, heads, 128),
        "weights": f32(b, s_new, heads),
        "block_table": i32(b, max_blocks),
        "positions": i32(b),
        "num_new": i32(b),
    }
    attributes = {
        "block_size": np.int32(block_size),
        "layout": np.int32(2),
        "hadamard": True,
        "eps": np.float32(1e-6),
        "weight_scale": np.float32(1),
    }
    blocks = wrong.get("blocks", operands["blocks"])
    results = {
        "updated": result(*blocks.shape, dtype=blocks.dtype),
        "codes": result(b, s_new, heads, 128, dtype=jnp.float8_e4m3fn),
        "scaled": result(b, s_new, heads),
    }
    return call("index_append", *replaced(wrong, operands, results, attributes))


def project(**wrong):
    operands = {
        "x": zeros(rows, groups, k + 2 * pairs) + 1,
        "w": zeros(groups, k, n) + 1,
        "w1": zeros(groups, k, 0),
        "w2": zeros(groups, k, 0),
        "exact_w": f32(groups, k, 5) + 2,
        "cos": f32(rows, pairs),
        "sin": f32(rows, pairs),
    }
    results = {
        "y": result(rows, groups, n + 2 * pairs, dtype=jnp.bfloat16),
        "exact_y": result(rows, groups, 5),
    }
    attributes = {"transposed": False, "layout": np.int32(2)}
    return call("project", *replaced(wrong, operands, results, attributes))


def test_the_good_calls_are_taken():
    blocks, q_latent = latent_append()
    np.testing.assert_array_equal(blocks.astype(jnp.float32), 0)
    np.testing.assert_array_equal(q_latent.astype(jnp.float32), 0)
    for x in index_append():
        np.testing.assert_array_equal(x.astype(jnp.float32), 0)
    y, exact_y = project()
    np.testing.assert_array_equal(exact_y, 2 * k)
    np.testing.assert_array_equal(y[..., :n].astype(jnp.float32), k)
    np.testing.assert_array_equal(y[..., n:].astype(jnp.float32), 0)


LATENT_APPEND = {
    "projected of rank 2": ({"projected": zeros(b, columns)}, "projected must have shape"),
    "few columns": ({"projected": zeros(b, s_new, columns - 1)}, "projected must have at least"),
    "a wide row": ({"blocks": zeros(num_blocks, block_size, 1, d_qk - 8)}, "rows must end in"),
    "q_norm of rank 2": ({"q_norm": zeros(1, q_rank)}, r"q_norm must have shape \[q_rank\]"),
    "q_norm in f32": ({"q_norm": f32(q_rank)}, "q_norm must have the element type of kv_norm"),
    "short sin": ({"sin": f32(b, s_new, pairs - 1)}, "sin must have shape"),
    "cos of others": ({"cos": f32(b, s_new + 1, pairs)}, "cos must have shape"),
    "positions of one": ({"positions": i32(1)}, "positions must have shape"),
    "q_latent": ({"q_latent": result(b, s_new, q_rank + 1, dtype=jnp.bfloat16)}, "q_latent must"),
    "layout": ({"layout": np.int32(4)}, "layout must be between 0 and 3"),
    "rows_dtype": ({"rows_dtype": np.int32(1)}, "rows_dtype must be that of blocks"),
    "no rows_dtype": ({"rows_dtype": np.int32(-1)}, "rows_dtype must be between 0 and 2"),
    "a format's width": ({"format": np.int32(3), "blocks": zeros(5, 65 * 576, dtype=jnp.uint8)},
                         "rows must end in"),
}  # fmt: skip

INDEX_APPEND = {
    "projected of rank 2": ({"projected": zeros(b, columns)}, "projected must have shape"),
    "few columns": ({"projected": zeros(b, s_new, 127)}, "projected must have at least 128"),
    "short blocks": ({"blocks": zeros(num_blocks, 64 * 131, dtype=jnp.uint8)}, "blocks must have"),
    "blocks of bf16": ({"blocks": zeros(num_blocks, 64 * 132)}, "blocks must be uint8"),
    "k_norm of rank 2": ({"k_norm": zeros(1, 128)}, "k_norm must have shape"),
    "a short k_bias": ({"k_bias": zeros(127)}, "k_bias must have shape"),
    "k_bias in f32": ({"k_bias": f32(128)}, "k_bias must have the element type of k_norm"),
    "wide pairs": ({"cos": f32(b, s_new, 65), "sin": f32(b, s_new, 65)}, "cos must have at most"),
    "pairs with none": ({"layout": np.int32(3)}, "cos must have at most 64 pairs, and none"),
    "short sin": ({"sin": f32(b, s_new, pairs - 1)}, "sin must have shape"),
    "cos of others": ({"cos": f32(b, s_new + 1, pairs)}, "cos must have shape"),
    "q of other heads": ({"q": zeros(b, s_new, heads - 1, 128)}, "q must have shape"),
    "narrow q": ({"q": zeros(b, s_new, heads, 64)}, "q must have shape"),
    "q in f32": ({"q": f32(b, s_new, heads, 128)}, "q must have the element type of projected"),
    "weights of others": ({"weights": f32(b, s_new + 1, heads)}, "weights must have shape"),
    "codes in bytes": ({"codes": result(b, s_new, heads, 128, dtype=jnp.uint8)}, "f8e4m3fn"),
    "short codes": ({"codes": result(b, s_new, 3, 128, dtype=jnp.float8_e4m3fn)}, "codes must"),
    "short scaled": ({"scaled": result(b, s_new, heads - 1)}, "scaled must have shape"),
    "positions of one": ({"positions": i32(1)}, "positions must have shape"),
    "layout": ({"layout": np.int32(4)}, "layout must be between 0 and 3"),
    "block_size": ({"block_size": np.int32(32)}, "blocks must have"),
}

PROJECT = {
    "x of rank 2": ({"x": zeros(rows, k)}, "x must have shape"),
    "x of other groups": ({"x": zeros(rows, groups + 1, k + 2 * pairs)}, "w must have shape"),
    "k past x": ({"x": zeros(rows, groups, k - 1)}, "w must have at most x's 15"),
    "another k": ({"w1": zeros(groups, k + 1, 8)}, "w must have shape"),
    "w in f32": ({"w": f32(groups, k, n)}, "w must have the element type of x"),
    "short y": ({"y": result(rows, groups, n, dtype=jnp.bfloat16)}, "y must have shape"),
    "no columns": ({"w": zeros(groups, k, 0)}, "w must have shape"),
    "exact of another k": ({"exact_w": f32(groups, k + 1, 5)}, "exact_w must have shape"),
    "short exact_y": ({"exact_y": result(rows, groups, 4)}, "exact_y must have shape"),
    "cos of others": ({"cos": f32(rows + 1, pairs)}, "cos must have shape"),
    "layout": ({"layout": np.int32(-1)}, "layout must be between 0 and 3"),
    "transposed": ({"transposed": True}, "w must have"),
}


@pytest.mark.parametrize(("wrong", "match"), LATENT_APPEND.values(), ids=LATENT_APPEND)
def test_latent_append_refuses(wrong, match):
    refused(latent_append, match, **wrong)


@pytest.mark.parametrize(("wrong", "match"), INDEX_APPEND.values(), ids=INDEX_APPEND)
def test_index_append_refuses(wrong, match):
    refused(index_append, match, **wrong)


@pytest.mark.parametrize(("wrong", "match"), PROJECT.values(), ids=PROJECT)
def test_project_refuses(wrong, match):
    refused(project, match, **wrong)


def project_twice(**wrong):
    operands = {
        "x": zeros(rows, groups, k) + 1,
        "w": zeros(groups, k, n) + 1,
        "beside": zeros(groups, k, 5) + 2,
        "v": zeros(4, 4, 24) + 1,  # 2 x 40 columns are 4 heads of 4 and 16 to be turned
        "cos": f32(rows, 8),
        "sin": f32(rows, 8),
    }
    results = {
        "y": result(rows, 4, 24 + 16, dtype=jnp.bfloat16),
        "beside_y": result(rows, groups, 5, dtype=jnp.bfloat16),
        "between": result(rows, groups * n, dtype=jnp.bfloat16),
    }
    attributes = {"transposed": False, "layout": np.int32(2)}
    return call("project_twice", *replaced(wrong, operands, results, attributes))


def test_the_good_pair_is_taken():
    y, beside_y, between = project_twice()
    np.testing.assert_array_equal(beside_y.astype(jnp.float32), 2 * k)
    np.testing.assert_array_equal(between.astype(jnp.float32), k)
    np.testing.assert_array_equal(y[..., :24].astype(jnp.float32), 4 * k)
    np.testing.assert_array_equal(y[..., 24:].astype(jnp.float32), 0)


PROJECT_TWICE = {
    "x of rank 2": ({"x": zeros(rows, k)}, "x must have shape"),
    "x of another k": ({"x": zeros(rows, groups, k + 1)}, "w must have shape"),
    "transposed": ({"transposed": True}, "w must have shape"),
    "beside of another k": ({"beside": zeros(groups, k + 1, 5)}, "beside must have shape"),
    "beside in f32": ({"beside": f32(groups, k, 5)}, "beside must have the element type of x"),
    "short beside_y": (
        {"beside_y": result(rows, groups, 4, dtype=jnp.bfloat16)},
        "beside_y must have shape",
    ),
    "v in f32": ({"v": f32(4, 4, 24)}, "v must have the element type of x"),
    "v of rank 2": ({"v": zeros(4, 24)}, "v must have shape"),
    "no heads": ({"v": zeros(0, 4, 24)}, "v must have shape"),
    "heads that do not divide": ({"v": zeros(3, 4, 24)}, "v must share out w's groups"),
    "m past a head": ({"v": zeros(4, 21, 24)}, "v must share out w's groups"),
    "an odd rest": ({"v": zeros(4, 5, 24)}, "v must share out w's groups"),
    "short sin": ({"sin": f32(rows, 7)}, "sin must have shape"),
    "cos of others": ({"cos": f32(rows + 1, 8)}, "cos must have shape"),
    "short y": ({"y": result(rows, 4, 24, dtype=jnp.bfloat16)}, "y must have shape"),
    "a short workspace": ({"between": result(rows, n, dtype=jnp.bfloat16)}, "between must have"),
    "layout": ({"layout": np.int32(4)}, "layout must be between 0 and 3"),
}


@pytest.mark.parametrize(("wrong", "match"), PROJECT_TWICE.values(), ids=PROJECT_TWICE)
def test_project_twice_refuses(wrong, match):
    refused(project_twice, match, **wrong)
