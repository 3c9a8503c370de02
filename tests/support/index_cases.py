"""The cases of the indexer, the hostile caches that they are made of, and a naive selection.

Only keys of visible tokens are stored; every other byte is poison, other layers included. Among a
sequence's blocks may be ids outside the layer; past them stands anything.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np

import cases
from jax_flashmla import CacheFormat
from stored import poisoned_blocks

FORMAT = CacheFormat(name="fp8_index")
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
SPARE_BLOCKS = 2


@dataclasses.dataclass(frozen=True)
class IndexCase:
    b: int = 2
    s_q: int = 1
    heads: int = 32
    s_k: int = 300  # room of the table, in whole blocks, and the longest sequence
    topk: int = 64
    dtype: str = "float8_e4m3fn"  # of q
    causal: bool = True
    layers: int = 1  # of the array; the last but one is scored
    bad_ids: bool = False  # among each sequence's blocks
    bad_lengths: bool = False  # negative, and past the table
    integers: bool = False  # so few small ones that scores are exact and most are tied

    def __str__(self) -> str:
        parts = [f"b{self.b}", f"sq{self.s_q}", f"h{self.heads}", f"sk{self.s_k}", f"k{self.topk}"]
        parts += ["e4m3" if self.dtype == "float8_e4m3fn" else self.dtype]
        parts += ["causal" if self.causal else "full"]
        parts += [f"layers{self.layers}"] if self.layers > 1 else []
        names = ("bad_ids", "bad_lengths", "integers")
        return "-".join(parts + [name for name in names if getattr(self, name)])

    @property
    def max_blocks(self) -> int:
        return -(-self.s_k // 64) + 1

    @property
    def layer_blocks(self) -> int:
        return self.b * self.max_blocks + SPARE_BLOCKS

    @property
    def first_block(self) -> int:
        return max(self.layers - 2, 0) * self.layer_blocks


@dataclasses.dataclass(frozen=True)
class Problem:
    case: IndexCase
    arguments: dict[str, Any]  # of index_scores
    expected: np.ndarray  # scores, in float64

    @property
    def visible(self) -> np.ndarray:
        """[b, s_q, tokens]."""
        arguments, case = self.arguments, self.case
        table, lengths = arguments["block_table"], arguments["cache_seqlens"]
        return visible_tokens(table, lengths, case.s_q, case.causal, case.layer_blocks)


def visible_tokens(
    block_table: np.ndarray, cache_seqlens: np.ndarray, s_q: int, causal: bool, layer_blocks: int
) -> np.ndarray:
    """[b, s_q, tokens]."""
    token = np.arange(block_table.shape[1] * 64)
    lengths = np.clip(cache_seqlens.astype(np.int64), 0, len(token))
    hidden = np.arange(s_q)[::-1] if causal else np.zeros(s_q, np.int64)
    seen = token < (lengths[:, None] - hidden)[:, :, None]
    inside = (block_table >= 0) & (block_table < layer_blocks)
    return seen & np.repeat(inside, 64, axis=1)[:, None]


def keys_of(blocks: np.ndarray) -> np.ndarray:
    """Blocks [..., bytes] as what they hold of 64 tokens each: "codes" and "scales"."""
    return blocks.view([("codes", np.uint8, (64, 128)), ("scales", np.float32, 64)])[..., 0]


def hostile_ids(rng: np.random.Generator, layer_blocks: int, n: int) -> np.ndarray:
    return rng.choice([-1, -(2**31), layer_blocks, layer_blocks + 1, 2147480000, 2**31 - 1], n)


def make_lengths(rng: np.random.Generator, case: IndexCase) -> np.ndarray:
    lengths = rng.integers(0, case.s_k + 1, case.b)
    lengths[rng.integers(case.b)] = case.s_k
    lengths[rng.integers(case.b)] = 0 if case.b > 2 else case.s_k
    if case.bad_lengths:
        lengths[:2] = (-5, 64 * case.max_blocks + 3)
        lengths[2:3] = 2**31 - 1
    return lengths.astype(np.int32)


def make_problem(case: IndexCase) -> Problem:
    rng = np.random.default_rng([cases.SEED, case.b, case.heads, case.s_k])
    lengths = make_lengths(rng, case)
    used = -(-np.clip(lengths.astype(np.int64), 0, 64 * case.max_blocks) // 64)
    table = hostile_ids(rng, case.layer_blocks, case.b * case.max_blocks)
    table = table.reshape(case.b, case.max_blocks)
    ids = rng.permutation(case.layer_blocks)[: table.size].reshape(table.shape)
    owned = np.arange(case.max_blocks) < used[:, None]
    if case.bad_ids:
        owned &= rng.random(table.shape) < 0.7
    table = np.where(owned, ids, table).astype(np.int32)

    tokens = case.max_blocks * 64
    q, weights, codes, scales = make_numbers(rng, case, tokens)
    blocks = poisoned_blocks(FORMAT, case.layer_blocks * case.layers)
    visible = visible_tokens(table, lengths, case.s_q, case.causal, case.layer_blocks)
    i, t = np.nonzero(visible.any(axis=1))
    at = table[i, t // 64] + case.first_block, t % 64
    keys_of(blocks)["codes"][at] = codes[i, t].view(np.uint8)
    keys_of(blocks)["scales"][at] = scales[i, t]

    arguments = {
        "q": q,
        "weights": weights,
        "blocks": blocks,
        "block_table": table,
        "cache_seqlens": lengths,
        "format": FORMAT,
        "causal": case.causal,
    }
    if case.layers > 1:
        arguments |= {"first_block": case.first_block, "layer_blocks": case.layer_blocks}
    expected = np.where(visible, naive_scores(q, weights, codes, scales), -np.inf)
    return Problem(case, arguments, expected)


def make_numbers(
    rng: np.random.Generator, case: IndexCase, tokens: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """q, weights, and codes [b, tokens, 128] and scales [b, tokens] of keys."""
    q_shape = (case.b, case.s_q, case.heads, 128)
    if case.integers:
        q = rng.integers(-1, 2, q_shape) * (rng.random(q_shape) < 0.1)
        weights = rng.integers(-1, 3, q_shape[:-1])
        codes = rng.integers(-1, 2, (case.b, tokens, 128))
        scales = 2.0 ** rng.integers(-1, 2, (case.b, tokens))
    else:
        q = rng.standard_normal(q_shape)
        weights = rng.standard_normal(q_shape[:-1]) / (128 * case.heads) ** 0.5
        codes = 200 * rng.standard_normal((case.b, tokens, 128))
        scales = 2.0 ** rng.integers(-9, -6, (case.b, tokens))
    q = q.astype(np.float32).astype(jnp.dtype(case.dtype))
    codes = np.clip(codes, -448, 448).astype(np.float32).astype(E4M3)
    return q, weights.astype(np.float32), codes, scales.astype(np.float32)


def naive_scores(
    q: np.ndarray, weights: np.ndarray, codes: np.ndarray, scales: np.ndarray
) -> np.ndarray:
    """[b, s_q, tokens] in float64; a NaN stays one."""
    keys = codes.astype(np.float64)
    scores = np.zeros((*q.shape[:2], codes.shape[1]))
    for i, j in np.ndindex(q.shape[:2]):
        products = np.maximum(q[i, j].astype(np.float64) @ keys[i].T, 0)
        scores[i, j] = (weights[i, j].astype(np.float64) @ products) * scales[i]
    return scores


def naive_topk(scores: np.ndarray, visible: np.ndarray, topk: int) -> np.ndarray:
    """Positions [b, s_q, topk] by a stable sort."""
    positions = np.full((*scores.shape[:2], topk), -1, np.int32)
    for at in np.ndindex(scores.shape[:2]):
        candidates = np.flatnonzero(visible[at] & (scores[at] > -np.inf))  # no NaN
        order = np.argsort(-scores[at][candidates], kind="stable")
        best = np.sort(candidates[order[:topk]])
        positions[at][: len(best)] = best
    return positions


def slots_of(positions: np.ndarray, block_table: np.ndarray) -> np.ndarray:
    block, offset = np.divmod(np.maximum(positions, 0), 64)
    ids = np.take_along_axis(block_table[:, None], block, axis=2)
    return np.where(positions >= 0, ids * 64 + offset, -1)


def hostile_keys(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes [n, 128] and scales [n], a third of them not numbers that a cache would hold."""
    codes = (100 * rng.standard_normal((n, 128), np.float32)).clip(-448, 448).astype(E4M3)
    codes.view(np.uint8)[rng.random((n, 128)) < 0.001] = 0x7F
    codes.view(np.uint8)[rng.random((n, 128)) < 0.001] = 0xFF
    scales = np.full(n, 2.0**-7)
    values = [np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, -0.01, 1e-40, 3e38, 0.0123]
    odd = rng.random(n) < 0.3
    scales[odd] = rng.choice(values, odd.sum())
    return codes, scales.astype(np.float32)


@functools.cache
def hostile() -> tuple[dict[str, Any], np.ndarray]:
    """Arguments, with expected scores [1, 2, tokens]."""
    rng = np.random.default_rng(5)
    codes, scales = hostile_keys(rng, 640)
    blocks = np.concatenate(
        [codes.view(np.uint8).reshape(10, -1), scales.view(np.uint8).reshape(10, -1)], axis=1
    )
    q = rng.standard_normal((1, 2, 8, 128)).astype(E4M3)
    weights = (rng.standard_normal((1, 2, 8)) / 32).astype(np.float32)
    arguments = {
        "q": q,
        "weights": weights,
        "blocks": blocks,
        "block_table": np.arange(10, dtype=np.int32)[None],
        "cache_seqlens": np.array([640], np.int32),
        "format": FORMAT,
        "causal": False,
    }
    with np.errstate(all="ignore"):
        expected = naive_scores(q, weights, codes[None], scales[None])
        return arguments, expected.astype(np.float32)


def index_cases() -> list[IndexCase]:
    return [
        IndexCase(b=3, heads=64, topk=40),
        IndexCase(s_q=2, dtype="bfloat16", topk=2048, bad_ids=True),
        IndexCase(b=3, s_q=5, heads=7, causal=False, layers=3, bad_lengths=True, topk=1),
        IndexCase(b=5, s_q=13, heads=1, s_k=40, layers=2, bad_ids=True, topk=17),
        IndexCase(b=1, heads=20, s_k=5000, topk=4096),
        IndexCase(b=4, s_q=3, heads=9, dtype="bfloat16", bad_lengths=True, bad_ids=True),
        IndexCase(b=2, s_q=4, heads=16, s_k=700, integers=True, topk=100),
    ]


def hopper_cases() -> list[IndexCase]:
    heads, lengths = (64, 32, 64, 8, 1, 33, 64, 32), (64, 1000, 9000, 4097, 20000)
    return [
        IndexCase(
            b=(1, 3, 33 if s_k < 9000 else 9, 2)[(i + j) % 4],
            s_q=(1, 2, 1, 4, 3, 8, 1, 21)[(3 * i + j) % 8],
            heads=heads[(i + 2 * j) % len(heads)],
            s_k=s_k,
            topk=(2048, 512, 1, 4096, 77)[(i + j) % 5],
            dtype="bfloat16" if (i + j) % 5 == 3 else "float8_e4m3fn",
            causal=j % 3 < 2,
            layers=1 + 2 * (j % 2),
            bad_ids=(i + j) % 3 == 0,
            bad_lengths=(i + j) % 4 == 2,
            integers=(i + j) % 6 == 5,
        )
        for i, s_k in enumerate(lengths)
        for j in range(8)
    ]
