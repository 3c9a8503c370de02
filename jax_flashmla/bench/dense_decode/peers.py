"""What the best public kernels take, as recorded on an H200."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from jax_flashmla.bench.dense_decode.shapes import Shape
from jax_flashmla.bench.limits import is_h200

FILE = Path(__file__).parent / "h200_peers.json"
DTYPE, BLOCK_SIZE = "bfloat16", 64  # of all recorded shapes


@functools.cache
def document() -> dict[str, Any]:
    """The file as it is: who was measured, how, on what."""
    return json.loads(FILE.read_text())


@functools.cache
def recorded() -> dict[Shape, dict[str, float]]:
    """Shape -> microseconds a call: {"flashmla_us": ..., "best_us": ..., ...}."""
    return {
        Shape(r["b"], r["s_q"], r["h_q"], r["s_k"], r["lengths"]): {
            key: value for key, value in r.items() if key.endswith("_us") and key != "limit_us"
        }
        for r in document()["rows"]
    }


def comparable(shape: Shape, *, device_kind: str, dtype: str, block_size: int) -> dict[str, float]:
    """What is recorded for the shape where times may be compared with it; else empty."""
    same = is_h200(device_kind) and (dtype, block_size) == (DTYPE, BLOCK_SIZE)
    return recorded().get(shape, {}) if same else {}
