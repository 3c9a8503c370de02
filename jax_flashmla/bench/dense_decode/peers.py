"""What the best public kernels take: over bf16 as recorded on an H200, over fp8 on an H100."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from jax_flashmla.bench.dense_decode.shapes import Shape
from jax_flashmla.bench.limits import is_h100, is_h200

FILE = Path(__file__).parent / "h200_peers.json"
FP8_FILE = Path(__file__).parent / "h100_fp8_peers.json"
FP8_FORMATS = ("fp8_row", "v32")  # compared with the fp8 peer, whose rows are fp8_row's
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


@functools.cache
def recorded_fp8() -> dict[Shape, dict[str, float]]:
    """The same of a cache in fp8, whatever its format."""
    return {
        Shape(r["b"], r["s_q"], r["h_q"], r["s_k"], "equal", format): {
            "flashmla_fp8_us": r["peer_us"],
            "best_us": r["peer_us"],
        }
        for format in FP8_FORMATS
        for r in json.loads(FP8_FILE.read_text())["rows"]
    }


def comparable(shape: Shape, *, device_kind: str, dtype: str, block_size: int) -> dict[str, float]:
    """What is recorded for the shape where times may be compared with it; else empty."""
    if (dtype, block_size) != (DTYPE, BLOCK_SIZE):
        return {}
    if shape.format == "dense":
        return recorded().get(shape, {}) if is_h200(device_kind) else {}
    return recorded_fp8().get(shape, {}) if is_h100(device_kind) else {}
