"""Sequences shared out over ranks: token t is on rank t mod size, as its local token t // size."""

from __future__ import annotations

import numpy as np

import cases
import naive


def count(lengths: np.ndarray, rank: int, size: int) -> np.ndarray:
    """Tokens of each sequence on a rank."""
    return np.array([len(range(rank, int(length), size)) for length in lengths], np.int32)


def share_out(
    keys: np.ndarray, lengths: np.ndarray, size: int, block_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Blocks [size, num_blocks, ...] and tables [size, b, max_blocks] of keys [b, s_k, h_kv, d]."""
    max_blocks = -(-keys.shape[1] // (size * block_size)) + 1
    locals_ = [count(lengths, rank, size) for rank in range(size)]
    made = [cases.make_table(local, block_size, max_blocks) for local in locals_]
    num_blocks = max(n for _, n in made)
    blocks = np.full((size, num_blocks, block_size, *keys.shape[2:]), np.nan, keys.dtype)
    for rank, (table, _) in enumerate(made):
        for i, length in enumerate(locals_[rank]):
            token = np.arange(length)
            mine = keys[i, rank + token * size]
            blocks[rank, table[i, token // block_size], token % block_size] = mine
    return blocks, np.stack([table for table, _ in made])


def naive_rank(
    q: np.ndarray,
    keys: np.ndarray,
    lengths: np.ndarray,
    rank: int,
    size: int,
    *,
    d_v: int,
    causal: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """q [b, s_q, h_q, d_qk] over a rank's tokens of keys [b, s_k, h_kv, d_qk]."""
    s_q, h_kv = q.shape[1], keys.shape[2]
    results = []
    for one, of, length in zip(q, keys, lengths, strict=True):
        end = length - (np.arange(s_q)[::-1] if causal else np.zeros(s_q, int))
        token = np.arange(of.shape[0])
        seen = (token < end[:, None]) & (token % size == rank)
        heads = [
            naive.attend(part, of[None, :, kv], d_v=d_v, mask=seen)
            for kv, part in enumerate(np.split(one, h_kv, axis=1))
        ]
        outs, lses = zip(*heads, strict=True)
        results.append((np.concatenate(outs, axis=1), np.concatenate(lses, axis=1)))
    outs, lses = zip(*results, strict=True)
    return np.stack(outs), np.stack(lses)
