"""FlashMLA's sparse prefill beside ours."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from jax_flashmla.bench.live import FlashMLA
from jax_flashmla.bench.sparse_prefill.shapes import D_V, Shape

MAX_HEADS = 128


def peer_calls(
    shape: Shape, arguments: tuple[Any, ...], flashmla: FlashMLA
) -> list[Callable[[], Any]]:
    """As `operation.CallsPeer`; arguments are (q, sources)."""
    if shape.h_q > MAX_HEADS:
        return []
    q, sources = arguments
    q = flashmla.padded(flashmla.tensor(q), dim=1)
    scale = shape.d_qk**-0.5

    def attend(kv: Any, indices: Any) -> Any:
        return flashmla.ops.sparse_prefill_fwd(q, kv, indices, scale, D_V, None, None)[0]

    tensors = [(flashmla.tensor(kv), flashmla.tensor(x[:, None])) for kv, x in sources]
    return [partial(attend, *pair) for pair in tensors]
