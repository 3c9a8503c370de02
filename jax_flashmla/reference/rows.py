"""Rows of any format in and out of an array of blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax.numpy as jnp

from jax_flashmla.cache.format import CacheFormat
from jax_flashmla.cache.quantise import dequantise_f32, encode

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Float32, Int32, Num, UInt8


def load_rows(
    format: CacheFormat, blocks: Num[Array, "*b ..."], kv_scale: Float32[Array, ""]
) -> Float[Array, "*b block_size h_kv d_qk"]:
    """Blocks [..., *format.block_shape] as rows, of `format.dtype`.

    Those of "fp8_row" are float32: code * kv_scale, not rounded.
    """
    if format.name == "dense":
        return blocks[..., : format.d_qk]
    planes = []
    if len(format.planes) == 1:
        planes = [blocks[..., 0, :]]
    else:
        for plane, size in enumerate(format.planes):
            first = _plane_offset(format, plane)
            stored = blocks[..., first : first + size * format.block_size]
            planes.append(stored.reshape(*blocks.shape[:-1], format.block_size, size))
    return _values(format, tuple(planes), kv_scale)


def take_rows(
    format: CacheFormat,
    blocks: Num[Array, "num_blocks ..."],
    block: Int32[Array, "*n"],
    offset: Int32[Array, "*n"],
    kv_scale: Float32[Array, ""],
) -> Float[Array, "*n h_kv d_qk"]:
    """The rows at the offsets of their blocks, all within the array; as load_rows' otherwise."""
    if format.name == "dense":
        return blocks[block, offset][..., : format.d_qk]
    if len(format.planes) == 1:
        return _values(format, (blocks[block, offset, 0],), kv_scale)
    planes = [
        blocks[block[..., None], _plane_bytes(format, plane, offset)]
        for plane in range(len(format.planes))
    ]
    return _values(format, tuple(planes), kv_scale)


def store_rows(
    format: CacheFormat,
    blocks: Num[Array, "num_blocks ..."],
    block: Int32[Array, "b s_new"],
    offset: Int32[Array, "b s_new"],
    rows: Num[Array, "b s_new h_kv d_qk"],
    kv_scale: Float32[Array, ""],
) -> Num[Array, "num_blocks ..."]:
    """Rows at the offsets of their blocks; block ids past the array drop theirs.

    Dense blocks may be an engine's pages [pages, page_size / pack, pack, row_stride].
    """
    if format.name == "dense" and blocks.shape[1:] != format.block_shape:
        _, outer, pack, _ = blocks.shape
        row = block * format.block_size + offset
        at = blocks.at[row // (outer * pack), row // pack % outer, row % pack, : rows.shape[-1]]
        return at.set(rows[:, :, 0], mode="drop")
    if format.name == "dense":
        if blocks.shape[-1] == rows.shape[-1]:
            return blocks.at[block, offset].set(rows, mode="drop")
        return blocks.at[block, offset, :, : rows.shape[-1]].set(rows, mode="drop")
    planes = encode(format, rows[..., 0, :], kv_scale)
    if len(planes) == 1:
        return blocks.at[block, offset, 0].set(planes[0], mode="drop")
    for plane, stored in enumerate(planes):
        at = blocks.at[block[..., None], _plane_bytes(format, plane, offset)]
        blocks = at.set(stored, mode="drop")
    return blocks


def _values(
    format: CacheFormat, planes: tuple[UInt8[Array, "*n _"], ...], kv_scale: Float32[Array, ""]
) -> Float[Array, "*n 1 d_qk"]:
    values = dequantise_f32(format, planes)
    rows = values * kv_scale if format.name == "fp8_row" else values.astype(format.dtype)
    return rows[..., None, :]


def _plane_offset(format: CacheFormat, plane: int) -> int:
    """Bytes from a block's beginning to its plane's."""
    return sum(format.planes[:plane]) * format.block_size


def _plane_bytes(
    format: CacheFormat, plane: int, offset: Int32[Array, "*n"]
) -> Int32[Array, "*n bytes"]:
    """Where each byte of the tokens lies in its block."""
    size = format.planes[plane]
    first = _plane_offset(format, plane) + offset * size
    byte = jnp.arange(size, dtype=jnp.int32).reshape(*(1,) * offset.ndim, size)
    return first[..., None] + byte
