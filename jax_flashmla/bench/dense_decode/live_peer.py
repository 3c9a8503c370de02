"""FlashMLA's dense decode beside ours: bf16, or fp8 with fp8 queries and one scale.

Beside `v32` it has the same rows, stored anew as it reads them: 576 bytes each.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jax_flashmla import CacheFormat
from jax_flashmla.bench.dense_decode.calls import rows_of
from jax_flashmla.bench.dense_decode.shapes import D_QK, D_V, Shape
from jax_flashmla.bench.live import FlashMLA

BLOCK_SIZE = 64  # the only one that it takes


@partial(jax.jit, static_argnums=0)
def _fp8_rows(format: CacheFormat, blocks: jax.Array) -> jax.Array:
    """Blocks [num_blocks, block_size, 1, 576] of e4m3 codes, as uint8."""
    codes = rows_of(format, blocks).astype(jnp.float8_e4m3fn)
    return jax.lax.bitcast_convert_type(codes, jnp.uint8)


def peer_calls(shape: Shape, arguments: tuple[Any, ...], peer: FlashMLA) -> list[Callable[[], Any]]:
    """As `operation.CallsPeer`; arguments are (q, blocks, tables, cache_seqlens, schedule)."""
    torch, ops = peer.torch, peer.ops
    blocks = arguments[1]
    if blocks.shape[1] != BLOCK_SIZE:
        return []
    if shape.format == "v32":
        blocks = _fp8_rows(CacheFormat(name="v32", block_size=BLOCK_SIZE), blocks)
    q, blocks, seqlens = (peer.tensor(x) for x in (arguments[0], blocks, arguments[3]))
    scale = D_QK**-0.5
    fp8 = shape.format != "dense"
    if fp8:
        q, blocks = q.to(torch.float8_e4m3fn), blocks.view(torch.float8_e4m3fn)
        schedule = ops.get_mla_decoding_metadata_dense_fp8(seqlens, shape.s_q * shape.h_q, 1)
        one = torch.ones(1, dtype=torch.float32, device=q.device)

    def attend(table: Any, schedule: Any) -> tuple[Any, ...]:
        common = (q, blocks, D_V, seqlens, table, scale, True, *schedule)
        return ops.fwd_kvcache_mla_fp8(*common, one, one) if fp8 else ops.dense_decode_fwd(*common)

    tables = [peer.tensor(table) for table in arguments[2]]
    if not fp8:  # the first call makes the schedule of all others
        schedule = attend(tables[0], (None, None))[2:4]

    def out_of(table: Any) -> Any:
        return attend(table, schedule)[0]

    return [partial(out_of, table) for table in tables]
