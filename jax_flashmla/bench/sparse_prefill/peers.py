"""What FlashMLA's sparse prefill takes, as recorded on an H100."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from jax_flashmla.bench.limits import is_h100
from jax_flashmla.bench.sparse_prefill.shapes import Shape

FILE = Path(__file__).parent / "h100_peers.json"
DTYPE = "bfloat16"


@functools.cache
def document() -> dict[str, Any]:
    """The file as it is: who was measured, how, on what."""
    return json.loads(FILE.read_text())


@functools.cache
def recorded() -> dict[Shape, dict[str, float]]:
    """Shape -> microseconds a call."""
    return {
        Shape(r["s_q"], r["h_q"], r["topk"], r["s_kv"], r["d_qk"]): {
            "flashmla_us": r["flashmla_us"],
            "best_us": r["flashmla_us"],
        }
        for r in document()["rows"]
    }


def comparable(shape: Shape, *, device_kind: str, dtype: str, block_size: int) -> dict[str, float]:
    """What is recorded for the shape where times may be compared with it; else empty."""
    del block_size  # there are no blocks
    return recorded().get(shape, {}) if is_h100(device_kind) and dtype == DTYPE else {}
