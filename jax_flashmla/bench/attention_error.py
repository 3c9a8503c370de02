"""Attention's error against naive attention on the host, which compiles nothing for a shape."""

from __future__ import annotations

from typing import Any

import numpy as np

SMALL = 1 << 26  # bytes; larger arrays are cut on the device


def heads_at(array: Any, *place: int) -> np.ndarray:
    """array[place], [heads, columns] in float32."""
    if array.nbytes <= SMALL:
        array = np.asarray(array)
    return np.asarray(array[place]).astype(np.float32)


def attention_error(
    out: np.ndarray, q: np.ndarray, rows: Any, *, d_v: int, sm_scale: float
) -> float:
    """The worst head's error in the 2-norm.

    Args:
        out: [heads, d_v] f32, to be judged; more heads than q's are a peer's padding.
        q: [h_q, d_qk] f32.
        rows: [tokens, d_qk], all attended.
    """
    rows = np.asarray(rows).astype(np.float32)
    scores = q @ rows.T * np.float32(sm_scale)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    expected = weights @ rows[:, :d_v] / weights.sum(axis=-1, keepdims=True)
    difference = np.linalg.norm(out[: len(q)] - expected, axis=-1)
    return float((difference / np.linalg.norm(expected, axis=-1)).max())
