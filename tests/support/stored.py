"""Blocks of any format, filled one plane of one token at a time: the rest is poison.

Unused bytes are 0xff, which as e4m3, as a scale and as float32 is NaN; in dense blocks NaN.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import cases
from jax_flashmla import CacheFormat
from jax_flashmla.cache import quantise

KV_SCALE = np.float32(0.011)
_CHUNK = 256  # rows quantised at a time: one shape, so one compilation


def scale_of(format: CacheFormat) -> np.ndarray | None:
    return KV_SCALE if format.name == "fp8_row" else None


def poisoned_blocks(format: CacheFormat, num_blocks: int) -> np.ndarray:
    fill = np.nan if format.name == "dense" else 0xFF
    return np.full((num_blocks, *format.block_shape), fill, format.storage_dtype)


@functools.cache
def _quantise(format: CacheFormat) -> Callable[..., tuple[jax.Array, ...]]:
    return jax.jit(functools.partial(quantise.quantise, format))


def _planes(format: CacheFormat, rows: np.ndarray) -> tuple[jax.Array, ...]:
    of_any_block_size = dataclasses.replace(format, block_size=64)  # so one compilation
    return _quantise(of_any_block_size)(rows, kv_scale=scale_of(format))


def store(format: CacheFormat, blocks: np.ndarray, rows: np.ndarray, slots: np.ndarray) -> None:
    """Rows [n, h_kv, d_qk] at slots [n] of blocks."""
    if format.name == "dense":
        block, offset = np.divmod(slots, format.block_size)
        blocks[block, offset, :, : format.d_qk] = rows
        return
    flat = blocks.reshape(len(blocks), -1)
    assert flat.shape[1] == format.block_bytes
    for begin in range(0, len(rows), _CHUNK):
        _store_chunk(format, flat, rows[begin : begin + _CHUNK], slots[begin : begin + _CHUNK])


def _store_chunk(
    format: CacheFormat, flat: np.ndarray, rows: np.ndarray, slots: np.ndarray
) -> None:
    padded = np.zeros((_CHUNK, format.d_qk), rows.dtype)
    padded[: len(rows)] = rows[:, 0]
    planes = _planes(format, padded)
    for k, plane in enumerate(np.asarray(p)[: len(rows)] for p in planes):
        size, first = format.planes[k], sum(format.planes[:k]) * format.block_size
        for slot, token_bytes in zip(slots, plane, strict=True):
            block, offset = divmod(int(slot), format.block_size)
            begin = first + offset * size
            flat[block, begin : begin + size] = token_bytes


def rounded(format: CacheFormat, rows: np.ndarray) -> np.ndarray:
    """What rows [n, d_qk] are once stored, in float32."""
    if format.name == "dense":
        return rows.astype(np.float32)
    results = []
    for begin in range(0, len(rows), _CHUNK):
        chunk = rows[begin : begin + _CHUNK]
        padded = np.zeros((_CHUNK, format.d_qk), rows.dtype)
        padded[: len(chunk)] = chunk
        values = np.asarray(quantise.dequantise_f32(format, _planes(format, padded)))
        if format.name == "fp8_row":  # kernels scale its codes later
            values = values * KV_SCALE
        else:
            values = values.astype(format.dtype).astype(np.float32)
        results.append(values[: len(chunk)])
    return np.concatenate(results)


def decode_inputs(
    format: CacheFormat, lengths: list[int], h_q: int, s_q: int, seed: int = 0
) -> tuple[np.ndarray, ...]:
    """q, blocks, table and lengths of dense_decode; what must not be read is poison."""
    rng = np.random.default_rng(seed)
    lengths = np.array(lengths, np.int32)
    max_blocks = -(-int(lengths.max()) // format.block_size) + 1
    table, num_blocks = cases.make_table(lengths, format.block_size, max_blocks)
    blocks = poisoned_blocks(format, num_blocks)
    for i, length in enumerate(lengths):
        shape = (int(length), format.h_kv, format.d_qk)
        rows = cases.normal(rng, shape, format.dtype, cases.ROW_SCALE)
        token = np.arange(length)
        slots = table[i, token // format.block_size] * format.block_size + token % format.block_size
        if length:
            store(format, blocks, rows, slots)
    shape = (len(lengths), s_q, h_q, format.d_qk)
    return cases.normal(rng, shape, format.dtype, cases.QUERY_SCALE), blocks, table, lengths


def dequantised(format: CacheFormat, blocks: np.ndarray) -> np.ndarray:
    """The blocks as dense ones [num_blocks, block_size, 1, d_qk] float32."""
    rows = quantise.dequantise_f32(format, (jnp.asarray(blocks[:, :, 0]),))
    return np.asarray(rows if scale_of(format) is None else rows * KV_SCALE)[:, :, None]
