"""The rows of a paged cache, gathered: what every attention of the reference reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax.numpy as jnp

from jax_flashmla.cache.format import CacheFormat
from jax_flashmla.reference.rows import load_rows

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Float32, Int32, Num


def gather_rows(
    format: CacheFormat,
    blocks: Num[Array, "num_blocks ..."],
    block_table: Int32[Array, "b max_blocks"],
    cache_seqlens: Int32[Array, "b"],
    kv_scale: Float32[Array, ""],
) -> Float[Array, "b tokens h_kv d_qk"]:
    """Each sequence's rows in order; zeros past its length and for block ids out of range.

    Dense blocks may be an engine's pages, as in store_rows.
    """
    if blocks.shape[1:] != format.block_shape:
        blocks = blocks.reshape(-1, *format.block_shape)
    num_blocks, block_size = blocks.shape[0], format.block_size
    b, max_blocks = block_table.shape
    in_range = (block_table >= 0) & (block_table < num_blocks)
    rows = load_rows(format, blocks[jnp.where(in_range, block_table, 0)], kv_scale)
    rows = rows.reshape(b, max_blocks * block_size, format.h_kv, format.d_qk)
    token = jnp.arange(max_blocks * block_size, dtype=jnp.int32)[None, :]
    keep = (token < cache_seqlens[:, None]) & jnp.repeat(in_range, block_size, axis=1)
    return jnp.where(keep[:, :, None, None], rows, jnp.zeros((), rows.dtype))
