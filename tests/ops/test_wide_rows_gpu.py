"""dense_decode on Hopper over rows wider than d_qk, whose padding is NaN."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cases
import tolerances
from jax_flashmla import CacheFormat, dense_decode, make_schedule

pytestmark = pytest.mark.gpu

# Query heads and tokens, and parts: tiles of up to 64 and of 32 rows, and, where the schedule is
# made for a small problem, of 16.
TILES = {"64 rows": (64, 2, 7), "32 rows": (20, 1, 7), "16 rows": (16, 1, None)}


@functools.cache
def problem(case: cases.DecodeCase) -> tuple[cases.DecodeInputs, tuple[np.ndarray, np.ndarray]]:
    inputs = cases.make_inputs(case)
    return inputs, cases.naive_decode(case, inputs)


@pytest.mark.parametrize(("row_stride", "h_kv"), [(640, 1), (584, 1), (640, 2), (1152, 2)])
@pytest.mark.parametrize("block_size", [16, 64, 256])
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_padding_is_neither_read_nor_missed(
    row_stride: int, h_kv: int, block_size: int, tile: str, dtype: str
) -> None:
    h_q, s_q, num_parts = TILES[tile]
    case = cases.DecodeCase(3, s_q, 300, h_q, h_kv, causal=True, dtype=dtype, block_size=block_size)
    inputs, expected = problem(case)
    q, blocks, table, lengths = inputs.arguments
    wide = np.full((*blocks.shape[:-1], row_stride), np.nan, blocks.dtype)
    wide[..., :576] = blocks
    schedule = make_schedule(
        lengths,
        h_q=h_q,
        h_kv=h_kv,
        s_q=s_q,
        num_parts=num_parts,
        max_seqlen=table.shape[1] * block_size,
    )
    assert schedule.tile_rows == (64 if num_parts else 16)
    decode = functools.partial(
        dense_decode, causal=True, schedule=schedule, implementation="kernel"
    )
    format = CacheFormat(h_kv=h_kv, block_size=block_size, dtype=dtype, row_stride=row_stride)
    got = decode(q, wide, table, lengths, format=format)
    tolerances.assert_decoded(got, expected)
    for x, y in zip(got, decode(q, blocks, table, lengths), strict=True):
        assert jnp.array_equal(x, y)


def test_default_is_the_kernel() -> None:
    """Without a word the rows of an engine's cache take no detour."""
    case = cases.DecodeCase(2, 1, 200, 128)
    inputs, expected = problem(case)
    q, blocks, table, lengths = inputs.arguments
    wide = np.pad(blocks, [(0, 0)] * 3 + [(0, 64)], constant_values=np.nan)
    decode = jax.jit(functools.partial(dense_decode, format=CacheFormat(row_stride=640)))
    assert "flashmla_dense_decode" in decode.lower(q, wide, table, lengths).as_text()
    tolerances.assert_decoded(decode(q, wide, table, lengths), expected)
