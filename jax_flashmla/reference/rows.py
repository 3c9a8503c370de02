"""Rows of any format in and out of an array of blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jax_flashmla.cache.format import CacheFormat

if TYPE_CHECKING:
    from jaxtyping import Array, Float32, Int32, Num


def load_rows(
    format: CacheFormat, blocks: Num[Array, "*b ..."], kv_scale: Float32[Array, ""]
) -> Num[Array, "*b ..."]:
    """Blocks [..., *format.block_shape] as rows [..., block_size, h_kv, d_qk]."""
    if format.name != "dense":
        raise NotImplementedError(f"the reference reads dense blocks, got {format.name}")
    return blocks[..., : format.d_qk]


def store_rows(
    format: CacheFormat,
    blocks: Num[Array, "num_blocks ..."],
    block: Int32[Array, "b s_new"],
    offset: Int32[Array, "b s_new"],
    rows: Num[Array, "b s_new h_kv d_qk"],
    kv_scale: Float32[Array, ""],
) -> Num[Array, "num_blocks ..."]:
    """Rows at the offsets of their blocks; block ids past the array drop theirs."""
    if format.name != "dense":
        raise NotImplementedError(f"the reference writes dense blocks, got {format.name}")
    return blocks.at[block, offset, :, : rows.shape[-1]].set(rows, mode="drop")
