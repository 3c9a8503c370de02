"""The C++ side of the indexer by itself refuses calls that would make it read out of bounds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffi_calls import call, i32, refused, replaced, result, zeros
from jax_flashmla import _limits
from jax_flashmla.ops.index_topk import workspace_bytes

b, s_q, heads, topk, max_blocks, num_blocks, num_parts = 2, 3, 4, 7, 2, 5, 6
SIZE = workspace_bytes(b=b, s_q=s_q, max_blocks=max_blocks)
GPU = [
    pytest.mark.gpu,
]


@pytest.fixture(params=["cpu", pytest.param("gpu", marks=GPU)])
def device(request):
    with jax.default_device(jax.devices(request.param)[0]):
        yield request.param


def f32(*shape):
    return zeros(*shape, dtype=jnp.float32)


def common():
    return {
        "q": zeros(b, s_q, heads, 128, dtype=jnp.float8_e4m3fn),
        "weights": f32(b, s_q, heads),
        "blocks": zeros(num_blocks, 64 * 132, dtype=jnp.uint8),
        "block_table": i32(b, max_blocks),
        "cache_seqlens": i32(b),
        "first_block": np.int32(0),
        "cuts": np.array([[0, 0]] * num_parts + [[b, 0]], np.int32),
    }


def index_scores(**wrong):
    """Without a visible token."""
    results = {"scores": result(b, s_q, max_blocks * 64)}
    attributes = {"causal": True, "layer_blocks": np.int32(num_blocks)}
    return call("index_scores", *replaced(wrong, common(), results, attributes))


def index_topk(**wrong):
    operands = common()
    order = ("q", "weights", "blocks", "scores", "block_table", "cache_seqlens", "first_block")
    operands["scores"] = f32(b, s_q, max_blocks * 64)
    operands = {name: operands[name] for name in (*order, "cuts")}
    results = {
        "indices": result(b, s_q, topk, dtype=jnp.int32),
        "positions": result(b, s_q, topk, dtype=jnp.int32),
        "workspace": result(SIZE, dtype=jnp.uint8),
    }
    attributes = {"causal": True, "has_scores": False, "layer_blocks": np.int32(num_blocks)}
    return call("index_topk", *replaced(wrong, operands, results, attributes))


WITH_SCORES = {"has_scores": True, "workspace": result(1, dtype=jnp.uint8)}


def test_the_good_calls_are_taken(device):
    np.testing.assert_array_equal(index_scores()[0], -np.inf)
    for given in ({}, WITH_SCORES, {**WITH_SCORES, "q": i32(1, 2), "blocks": i32(9)}):
        indices, positions, _ = index_topk(**given)
        np.testing.assert_array_equal(indices, -1)
        np.testing.assert_array_equal(positions, -1)


@pytest.mark.parametrize(
    ("b", "s_q", "max_blocks"),
    [(1, 1, 1), (3, 20, 5), (1, 50, 20000), (7, 4000, 300), (128, 2, 2048), (16384, 9, 1)],
)
def test_both_sides_size_the_workspace_alike(b, s_q, max_blocks):
    """Without memory for it: sizes are checked before anything is touched."""
    size = workspace_bytes(b=b, s_q=s_q, max_blocks=max_blocks)
    if size > 2**26:
        pytest.skip("too much memory")
    wrong = {
        "q": zeros(b, s_q, 1, 128, dtype=jnp.float8_e4m3fn),
        "weights": f32(b, s_q, 1),
        "block_table": i32(b, max_blocks),
        "cache_seqlens": i32(b),
        "cuts": np.array([[0, 0]] * num_parts + [[b, 0]], np.int32),
        "indices": result(b, s_q, 1, dtype=jnp.int32),
        "positions": result(b, s_q, 1, dtype=jnp.int32),
    }
    with jax.default_device(jax.devices("cpu")[0]):
        index_topk(**wrong, workspace=result(size, dtype=jnp.uint8))
        match = rf"workspace must have shape \[bytes={size}\], got \[{size - 1}\]"
        refused(index_topk, match, **wrong, workspace=result(size - 1, dtype=jnp.uint8))


QUERIES = {
    "q of rank 3": ({"q": zeros(b, heads, 128)}, r"q must have shape \[b, s_q, heads, columns\]"),
    "q in f16": (
        {"q": zeros(b, s_q, heads, 128, dtype=jnp.float16)},
        "q must be f8e4m3fn or bf16, got XLA element type",
    ),
    "q in f8e5m2": (
        {"q": zeros(b, s_q, heads, 128, dtype=jnp.float8_e5m2)},
        "q must be f8e4m3fn or bf16",
    ),
    "narrow q": (
        {"q": zeros(b, s_q, heads, 64)},
        r"q must have shape \[b=2, s_q=3, heads=4, columns=128\], got \[2, 3, 4, 64\]",
    ),
    "many heads": (
        {"q": zeros(b, s_q, _limits.MAX_INDEX_HEADS + 1, 128)},
        f"heads must be at most {_limits.MAX_INDEX_HEADS}, got {_limits.MAX_INDEX_HEADS + 1}",
    ),
    "weights of fewer heads": (
        {"weights": f32(b, s_q, heads - 1)},
        r"weights must have shape \[b=2, s_q=3, heads=4\], got \[2, 3, 3\]",
    ),
    "weights in bf16": ({"weights": zeros(b, s_q, heads)}, "dtype: expected F32"),
    "blocks in bf16": (
        {"blocks": zeros(num_blocks, 64 * 132)},
        "blocks must be uint8, the bytes of their format",
    ),
    "blocks without scales": (
        {"blocks": zeros(num_blocks, 64 * 128, dtype=jnp.uint8)},
        r"blocks must have shape \[num_blocks=5, block_bytes=8448\], got \[5, 8192\]",
    ),
    "a layer beyond the array": (
        {"layer_blocks": np.int32(num_blocks + 1)},
        "blocks must have at least layer_blocks=6 blocks, got 5",
    ),
}
TABLE = {
    "no layer": ({"layer_blocks": np.int32(0)}, "layer_blocks must be at least 1, got 0"),
    "a layer of too many slots": (
        {"layer_blocks": np.int32(2**25)},
        r"layer_blocks \* block_size \(slots\) must be less than 2\^31",
    ),
    "a short table": (
        {"block_table": i32(b - 1, max_blocks)},
        r"block_table must have shape \[b=2, max_blocks=2\], got \[1, 2\]",
    ),
    "float ids": ({"block_table": f32(b, max_blocks)}, "expected S32"),
    "more lengths": ({"cache_seqlens": i32(b + 1)}, r"cache_seqlens must have shape \[b=2\]"),
    "first_block of rank 1": ({"first_block": i32(1)}, "rank: expected 0"),
    "cuts without a part": ({"cuts": i32(1, 2)}, "cuts must have shape"),
    "no causal": ({"causal": None}, "attributes but got"),
}
SCORES = {
    "a short result": (
        {"scores": result(b, s_q, 64)},
        r"scores must have shape \[b=2, s_q=3, max_blocks \* block_size=128\], got \[2, 3, 64\]",
    ),
}
TOPK = {
    "fewer positions": (
        {"positions": result(b, s_q, topk - 1, dtype=jnp.int32)},
        r"positions must have shape \[b=2, s_q=3, topk=7\], got \[2, 3, 6\]",
    ),
    "indices of another s_q": (
        {"indices": result(b, s_q + 1, topk, dtype=jnp.int32)},
        r"indices must have shape \[b=2, s_q=3, topk=7\], got \[2, 4, 7\]",
    ),
    "many indices": (
        {
            "indices": result(b, s_q, _limits.MAX_TOPK + 1, dtype=jnp.int32),
            "positions": result(b, s_q, _limits.MAX_TOPK + 1, dtype=jnp.int32),
        },
        f"topk must be at most {_limits.MAX_TOPK}, got {_limits.MAX_TOPK + 1}",
    ),
    "workspace of floats": ({"workspace": result(SIZE)}, "expected U8"),
    "scores of fewer tokens": (
        {**WITH_SCORES, "scores": f32(b, s_q, 64)},
        r"scores must have shape \[b=2, s_q=3, max_blocks \* block_size=128\], got \[2, 3, 64\]",
    ),
    "scores in bf16": ({**WITH_SCORES, "scores": zeros(b, s_q, 128)}, "dtype: expected F32"),
    "scores of more sequences": (
        {**WITH_SCORES, "scores": f32(b + 1, s_q, 128)},
        r"scores must have shape \[b=2",
    ),
}
OF_SCORES = {**QUERIES, **TABLE, **SCORES}
OF_TOPK = {**QUERIES, **TABLE, **TOPK}


@pytest.mark.parametrize(("wrong", "match"), OF_SCORES.values(), ids=OF_SCORES)
def test_index_scores_refuses(device, wrong, match):
    refused(index_scores, match, **wrong)


@pytest.mark.parametrize(("wrong", "match"), OF_TOPK.values(), ids=OF_TOPK)
def test_index_topk_refuses(device, wrong, match):
    refused(index_topk, match, **wrong)


@pytest.mark.parametrize("name", ["block_table", "cache_seqlens"])
def test_given_scores_are_held_against_the_table(name):
    wrong = {name: i32(b + 1, max_blocks) if name == "block_table" else i32(b + 1)}
    with jax.default_device(jax.devices("cpu")[0]):
        refused(index_topk, f"{name} must have shape", **WITH_SCORES, **wrong)
