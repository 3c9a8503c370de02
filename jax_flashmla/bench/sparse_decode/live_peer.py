"""FlashMLA's sparse decode beside ours: v32, and v4 alone or with an extra cache."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from jax_flashmla.bench.live import FlashMLA
from jax_flashmla.bench.sparse_decode.shapes import D_V, Shape

FORMATS = ("v32", "v4")
MAX_HEADS = 128


def peer_calls(shape: Shape, arguments: tuple[Any, ...], peer: FlashMLA) -> list[Callable[[], Any]]:
    """As `operation.CallsPeer`; arguments are (q, blocks, picks, schedule)."""
    if shape.format not in FORMATS or shape.h_q > MAX_HEADS:
        return []
    torch, sparse_decode = peer.torch, peer.ops.sparse_decode_fwd
    q, blocks, picks, _ = arguments
    q = peer.padded(peer.tensor(q))
    cache = peer.tensor(blocks).view(torch.float8_e4m3fn)
    if shape.format == "v4":  # rows of 584 bytes by their number; it knows where the planes are
        block_bytes, row_bytes = cache.shape[1], shape.row_bytes
        block_size = block_bytes // row_bytes
        cache = cache.as_strided(
            (cache.shape[0], block_size, 1, row_bytes), (block_bytes, row_bytes, row_bytes, 1)
        )
    scale = shape.d_qk**-0.5
    tensors = [tuple(peer.tensor(x) for x in pick) for pick in picks]

    def attend(pick: tuple[Any, ...], metadata: Any, splits: Any) -> tuple[Any, ...]:
        indices, *extra = pick
        extras = (cache, extra[0], None) if extra else (None, None, None)
        return sparse_decode(
            q, cache, indices, None, None, metadata, splits, *extras, D_V, scale, None
        )

    schedule = attend(tensors[0], None, None)[2:4]  # made by the first call

    def out_of(pick: tuple[Any, ...]) -> Any:
        return attend(pick, *schedule)[0]

    return [partial(out_of, pick) for pick in tensors]
