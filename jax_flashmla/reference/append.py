"""cache_append in pure JAX: rows scattered to their slots."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import jax.numpy as jnp

from jax_flashmla.cache.format import CacheFormat
from jax_flashmla.reference.rows import store_rows

if TYPE_CHECKING:
    from jaxtyping import Array, Float32, Int32, Num


def cache_append(
    blocks: Num[Array, "num_blocks ..."],
    rows: Num[Array, "b s_new h_kv d_qk"],
    block_table: Int32[Array, "b max_blocks"],
    positions: Int32[Array, "b"],
    num_new: Int32[Array, "b"],
    kv_scale: Float32[Array, ""],
    *,
    format: CacheFormat,
) -> Num[Array, "num_blocks ..."]:
    num_blocks, block_size = blocks.size // math.prod(format.block_shape), format.block_size
    max_blocks = block_table.shape[1]
    step = jnp.arange(rows.shape[1], dtype=jnp.int32)[None, :]
    token = positions[:, None] + step  # [b, s_new]; past 2^31 - 1 it wraps to below 0
    slot = token // block_size
    block = jnp.take_along_axis(block_table, jnp.clip(slot, 0, max_blocks - 1), axis=1)
    fits = (token >= 0) & (slot < max_blocks) & (block >= 0) & (block < num_blocks)
    block = jnp.where(fits & (step < num_new[:, None]), block, num_blocks)
    return store_rows(format, blocks, block, token % block_size, rows, kv_scale)
