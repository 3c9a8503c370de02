"""What DeepGEMM's logits and SGLang's top-k take, as recorded on an H100."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from jax_flashmla.bench.indexer.shapes import ScoresShape, TopkShape
from jax_flashmla.bench.limits import is_h100

FILE = Path(__file__).parent / "h100_peers.json"


@functools.cache
def document() -> dict[str, Any]:
    """The file as it is: who was measured, how, on what."""
    return json.loads(FILE.read_text())


@functools.cache
def recorded() -> dict[ScoresShape, dict[str, float]]:
    """Shape -> microseconds a call. Of a selection with scores, DeepGEMM and SGLang together."""
    logits, select = {}, {}
    for row in document()["rows"]:
        if row["op"] == "logits":
            shape = ScoresShape(row["b"], row["s_q"], row["heads"], row["s_k"])
            logits[shape] = row["deepgemm_us"]
        elif "topk_us" in row:
            select[row["rows"], row["s_k"]] = row["topk_us"]
    found: dict[ScoresShape, dict[str, float]] = {
        shape: {"deepgemm_us": us, "best_us": us} for shape, us in logits.items()
    }
    for (rows, s_k), us in select.items():
        found[TopkShape(rows, 1, 0, s_k)] = {"sglang_us": us, "best_us": us}
    for shape, us in logits.items():
        selection = select.get((shape.b * shape.s_q, shape.s_k))
        if selection is not None:
            both = {"deepgemm_us": us, "sglang_us": selection, "best_us": us + selection}
            found[TopkShape(shape.b, shape.s_q, shape.heads, shape.s_k)] = both
    return found


def comparable(
    shape: ScoresShape, *, device_kind: str, dtype: str, block_size: int
) -> dict[str, float]:
    """What is recorded for the shape where times may be compared with it; else empty."""
    return recorded().get(shape, {}) if is_h100(device_kind) else {}
