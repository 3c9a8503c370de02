"""The arguments that describe one cache of sparse attention, checked."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jax_flashmla import _checks, _limits
from jax_flashmla.cache.format import format_of_blocks
from jax_flashmla.reference.sparse import Source


def as_source(
    prefix: str,
    q: jax.Array,
    blocks: Any,
    indices: Any,
    topk_length: Any,
    first_block: Any,
    format: Any,
    layer_blocks: Any,
) -> Source:
    """A cache's arguments, checked; their names begin with the prefix."""
    b, s_q, _, d_qk = q.shape
    name = f"{prefix}blocks"
    format = format_of_blocks(format, blocks, prefix)
    if q.dtype != format.dtype:
        raise TypeError(f"{name} must have q's dtype {q.dtype}, got {format.dtype}")
    if d_qk != format.d_qk:
        raise ValueError(
            f"{name} must have rows of q's d_qk = {d_qk}, got {format.d_qk} in shape {blocks.shape}"
        )
    if format.h_kv != 1:
        raise ValueError(f"{name} must have h_kv = 1 for sparse_decode, got {format.h_kv}")
    num_blocks = blocks.shape[0]
    if layer_blocks is None:
        layer_blocks = num_blocks
    layer_blocks = _checks.check_int(f"{prefix}layer_blocks", layer_blocks, 1, num_blocks)
    if layer_blocks * format.block_size > _limits.INT32_MAX:
        raise ValueError(
            f"{prefix}layer_blocks * block_size must be at most 2^31 - 1 slots, got {layer_blocks} "
            f"* {format.block_size}"
        )
    first = _checks.as_first_block(f"{prefix}first_block", first_block, num_blocks - layer_blocks)
    name = f"{prefix}indices"
    indices = _checks.as_int32(name, indices, "[b, s_q, topk]")
    if indices.shape[:2] != (b, s_q):
        raise ValueError(
            f"{name} must be [b, s_q, topk] with q's b = {b} and s_q = {s_q}, got shape "
            f"{indices.shape}"
        )
    name, topk = f"{prefix}topk_length", indices.shape[-1]
    lengths = _as_lengths(name, topk_length, b, s_q, topk)
    return Source(blocks, indices, lengths, first, format, layer_blocks)


def _as_lengths(name: str, lengths: Any, b: int, s_q: int, topk: int) -> jax.Array:
    """[b, s_q] int32."""
    if lengths is None:
        return jnp.full((b, s_q), topk, jnp.int32)
    if len(getattr(lengths, "shape", ())) != 2:
        lengths = _checks.as_per_sequence(name, lengths, b)
        return jnp.broadcast_to(lengths[:, None], (b, s_q))
    lengths = _checks.as_int32(name, lengths, "[b, s_q]")
    if lengths.shape != (b, s_q):
        raise ValueError(
            f"{name} must be [b] or [b, s_q] with q's b = {b} and s_q = {s_q}, got shape "
            f"{lengths.shape}"
        )
    return lengths
