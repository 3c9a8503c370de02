"""The arguments that the indexer's operations have in common, checked."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_flashmla import _checks, _limits
from jax_flashmla.cache.format import INDEX_BLOCK_SIZE, LAYOUTS, CacheFormat, format_of_blocks

QUERY_DTYPES = (np.dtype(jnp.float8_e4m3fn), np.dtype(jnp.bfloat16))
COLUMNS = LAYOUTS["fp8_index"].d_qk
MOST_BLOCKS = _limits.INT32_MAX // INDEX_BLOCK_SIZE  # whose slots fit in 32 bits


class IndexLayer(NamedTuple):
    """A layer's keys."""

    blocks: jax.Array
    first_block: jax.Array
    layer_blocks: int


def check_queries(q: Any, weights: Any) -> tuple[int, int, int]:
    """b, s_q and heads."""
    b, s_q, heads, columns = _checks.check_array("q", q, "[b, s_q, heads, 128]", QUERY_DTYPES)
    if columns != COLUMNS:
        raise ValueError(f"q must have {COLUMNS} columns, got shape {q.shape}")
    if heads > _limits.MAX_INDEX_HEADS:
        raise ValueError(
            f"q must have at most {_limits.MAX_INDEX_HEADS} heads, got {heads} in shape {q.shape}"
        )
    if b * s_q * heads > _limits.INT32_MAX:
        raise ValueError(
            f"q must have less than 2^31 rows b * s_q * heads, got {b} * {s_q} * {heads} = "
            f"{b * s_q * heads}"
        )
    shape = _checks.check_array("weights", weights, "[b, s_q, heads]", (np.dtype(np.float32),))
    if shape != (b, s_q, heads):
        raise ValueError(f"weights must be [b, s_q, heads] as q, {(b, s_q, heads)}, got {shape}")
    return b, s_q, heads


def as_index_layer(blocks: Any, format: Any, first_block: Any, layer_blocks: Any) -> IndexLayer:
    check_index_format(format)
    format_of_blocks(format, blocks)
    num_blocks = blocks.shape[0]
    if layer_blocks is None:
        layer_blocks = num_blocks
    layer_blocks = _checks.check_int("layer_blocks", layer_blocks, 1, num_blocks)
    if layer_blocks > MOST_BLOCKS:
        raise ValueError(
            f"layer_blocks * block_size must be at most 2^31 - 1 slots, got {layer_blocks} * "
            f"{INDEX_BLOCK_SIZE}"
        )
    first = _checks.as_first_block("first_block", first_block, num_blocks - layer_blocks)
    return IndexLayer(blocks, first, layer_blocks)


def as_index_table(
    block_table: Any, cache_seqlens: Any, b: int, of: str
) -> tuple[jax.Array, jax.Array]:
    """[b, max_blocks] and [b] int32, for the b sequences of an argument."""
    cache_seqlens = _checks.as_cache_seqlens(cache_seqlens)
    if cache_seqlens.shape != (b,):
        raise ValueError(
            f"cache_seqlens must have one entry per sequence of {of}, b = {b}, got shape "
            f"{cache_seqlens.shape}"
        )
    return _checks.as_block_table(block_table, b, INDEX_BLOCK_SIZE), cache_seqlens


def check_index_format(format: Any) -> None:
    if not isinstance(format, CacheFormat):
        raise TypeError(f"format must be a CacheFormat, got {_checks.describe(format)}")
    if format.name != "fp8_index":
        raise ValueError(f"format must be fp8_index for an indexer's keys, got {format.name}")


class Source(NamedTuple):
    """What is selected from, checked. Without scores they are [1, 1, 1]; with them, q, weights and
    blocks stand for none."""

    q: jax.Array
    weights: jax.Array
    blocks: jax.Array
    scores: jax.Array
    block_table: jax.Array
    cache_seqlens: jax.Array
    first_block: jax.Array
    layer_blocks: int

    @property
    def capacity(self) -> int:
        """Tokens of a row of the table."""
        return self.block_table.shape[1] * INDEX_BLOCK_SIZE


def check_source(
    q: Any, weights: Any, blocks: Any, block_table: Any, cache_seqlens: Any, format: Any,
    scores: Any, first_block: Any, layer_blocks: Any,
) -> tuple[Source, bool]:  # fmt: skip
    """index_topk's arguments, and whether scores are given."""
    if scores is None:
        b, _, _ = check_queries(q, weights)
        layer = as_index_layer(blocks, format, first_block, layer_blocks)
        block_table, cache_seqlens = as_index_table(block_table, cache_seqlens, b, "q")
        scores = jnp.zeros((1, 1, 1), jnp.float32)
        return Source(
            q, weights, layer.blocks, scores, block_table, cache_seqlens, layer.first_block,
            layer.layer_blocks,
        ), False  # fmt: skip
    for name, value in (("q", q), ("weights", weights), ("blocks", blocks)):
        if value is not None:
            raise ValueError(f"{name} must be None with scores, got a {type(value).__name__}")
    if format is not None:
        check_index_format(format)
    b, s_q, tokens = _checks.check_array(
        "scores", scores, "[b, s_q, max_blocks * 64]", (np.dtype(np.float32),)
    )
    block_table, cache_seqlens = as_index_table(block_table, cache_seqlens, b, "scores")
    if tokens != block_table.shape[1] * INDEX_BLOCK_SIZE:
        raise ValueError(
            "scores must be of block_table's max_blocks * 64 = "
            f"{block_table.shape[1] * INDEX_BLOCK_SIZE} tokens, got shape {scores.shape}"
        )
    if b * s_q > _limits.INT32_MAX:
        raise ValueError(f"scores must have less than 2^31 rows b * s_q, got {b} * {s_q}")
    first = _checks.as_first_block("first_block", first_block, MOST_BLOCKS)
    if layer_blocks is None:
        layer_blocks = MOST_BLOCKS
    layer_blocks = _checks.check_int("layer_blocks", layer_blocks, 1, MOST_BLOCKS)
    return Source(*no_keys(), scores, block_table, cache_seqlens, first, layer_blocks), True


def no_keys() -> tuple[jax.Array, jax.Array, jax.Array]:
    """What stands for q, weights and blocks where scores are given."""
    blocks = jnp.zeros((1, CacheFormat(name="fp8_index").block_bytes), jnp.uint8)
    return jnp.zeros((1, 1, 1, COLUMNS), jnp.bfloat16), jnp.zeros((1, 1, 1), jnp.float32), blocks
