"""Attention from its definition in float64 NumPy: what every implementation is held against.

It knows neither blocks nor formats nor schedules: rows are gathered, and dequantised, beforehand.
"""

from __future__ import annotations

import numpy as np


def attend(
    q: np.ndarray,
    rows: np.ndarray,
    values: np.ndarray | None = None,
    *,
    d_v: int | None = None,
    sm_scale: float | None = None,
    mask: np.ndarray | None = None,
    sink: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Each group of queries over the rows that were gathered for it.

    Args:
        q: [..., h, d_qk].
        rows: [..., n, d_qk], the keys; a row that occurs twice counts twice. Leading axes are q's,
            or 1, or missing.
        values: [..., n, d_v]; by default the first d_v columns of rows.
        d_v: needed without values.
        sm_scale: by default d_qk ** -0.5.
        mask: [..., n] bool, the rows that are attended to; others may hold anything. By default
            all.
        sink: [h], a score without a value: it takes weight from out and is not in lse.

    Returns:
        out [..., h, d_v], lse [..., h] float64, natural log; 0 and -inf where there is nothing to
        attend to.
    """
    if values is None:
        values = rows[..., :d_v]
    if mask is None:
        mask = np.ones(rows.shape[:-1], bool)
    values = np.where(mask[..., None], values, 0).astype(np.float64, copy=False)
    return weigh(scores(q, rows, sm_scale=sm_scale, mask=mask), values, sink)


def scores(
    q: np.ndarray, rows: np.ndarray, *, sm_scale: float | None = None, mask: np.ndarray
) -> np.ndarray:
    """[..., h, n] float64, of attend's arguments; -inf where masked."""
    rows = np.where(mask[..., None], rows, 0).astype(np.float64, copy=False)
    scale = q.shape[-1] ** -0.5 if sm_scale is None else sm_scale
    scores = q.astype(np.float64) @ np.swapaxes(rows, -1, -2) * scale
    return np.where(mask[..., None, :], scores, -np.inf)


def weigh(
    scores: np.ndarray, values: np.ndarray, sink: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """attend's results, of scores [..., h, n] and values [..., n, d_v] float64."""
    top = scores.max(axis=-1, keepdims=True, initial=-np.inf)
    top = np.where(np.isneginf(top), 0, top)
    weights = np.exp(scores - top)
    total = weights.sum(axis=-1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = (top + np.log(total))[..., 0]
    if sink is not None:
        total = total + np.exp(sink.astype(np.float64)[:, None] - top)
    return weights @ values / np.where(total == 0, 1, total), lse


def dense(
    q: np.ndarray,
    keys: np.ndarray,
    length: int,
    *,
    d_v: int,
    sm_scale: float | None = None,
    causal: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """One sequence over its first `length` unpaged rows; causal queries are its last s_q tokens.

    q [s_q, h_q, d_qk], keys [s_k, h_kv, d_qk] -> out [s_q, h_q, d_v], lse [s_q, h_q].
    """
    s_q, h_kv = q.shape[0], keys.shape[1]
    end = length - np.arange(s_q)[::-1] if causal else np.full(s_q, length)
    seen = np.arange(length) < end[:, None]  # [s_q, length]
    results = [
        attend(heads, keys[None, :length, kv], d_v=d_v, sm_scale=sm_scale, mask=seen)
        for kv, heads in enumerate(np.split(q, h_kv, axis=1))
    ]
    outs, lses = zip(*results, strict=True)
    return np.concatenate(outs, axis=1), np.concatenate(lses, axis=1)
