"""What the best public kernels take, as recorded on an H200."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from jax_flashmla.cli.bench.shapes import Row

FILE = Path(__file__).parent / "h200_peers.json"
DTYPE, BLOCK_SIZE = "bfloat16", 64  # of all recorded rows


@functools.cache
def document() -> dict[str, Any]:
    """The file as it is: who was measured, how, on what."""
    return json.loads(FILE.read_text())


@functools.cache
def recorded() -> dict[Row, dict[str, float]]:
    """Row -> microseconds a call: {"flashmla_us": ..., "best_us": ..., ...}."""
    return {
        Row(r["b"], r["s_q"], r["h_q"], r["s_k"], r["lengths"]): {
            key: value for key, value in r.items() if key.endswith("_us") and key != "limit_us"
        }
        for r in document()["rows"]
    }


def is_h200(device_kind: str) -> bool:
    """Whether it is the GPU of the file: neither its PCIe form nor a GH200."""
    words = device_kind.split()
    return "H200" in words and "NVL" not in words


def comparable(row: Row, *, device_kind: str, dtype: str, block_size: int) -> dict[str, float]:
    """What is recorded for the row where times may be compared with it; else empty."""
    same = is_h200(device_kind) and (dtype, block_size) == (DTYPE, BLOCK_SIZE)
    return recorded().get(row, {}) if same else {}
