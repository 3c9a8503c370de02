"""The cases that every implementation is tested on, and the hostile caches they are made of.

What must not be read is poisoned: cache slots past a sequence's length and blocks of nobody are
NaN, and table entries past the last block are 2147480000, far outside the cache.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np

import naive

SEED = int(os.environ.get("JAX_FLASHMLA_TEST_SEED", "0"))
# Cache rows as FlashMLA's tests draw them, to which its tolerances belong; queries so large that
# the scores still have a standard deviation of 1.
ROW_SCALE = 0.1
QUERY_SCALE = 10.0
UNUSED_ENTRY = 2147480000
SPARE_BLOCKS = 3  # in every cache, of nobody


@dataclasses.dataclass(frozen=True)
class DecodeCase:
    b: int
    s_q: int
    s_k: int  # the longest sequence, tokens
    h_q: int
    h_kv: int = 1
    ragged: bool = True
    causal: bool = False
    zero_lengths: bool = False  # every third sequence is empty
    dtype: str = "bfloat16"
    d_qk: int = 576
    d_v: int = 512
    block_size: int = 64

    def __str__(self) -> str:
        parts = [f"b{self.b}", f"sq{self.s_q}", f"sk{self.s_k}", f"hq{self.h_q}", f"hkv{self.h_kv}"]
        parts += ["ragged" if self.ragged else "even", "causal" if self.causal else "full"]
        if self.zero_lengths:
            parts.append("zeros")
        if self.dtype != "bfloat16":
            parts.append(self.dtype)
        if (self.d_qk, self.d_v, self.block_size) != (576, 512, 64):
            parts.append(f"d{self.d_qk}v{self.d_v}bs{self.block_size}")
        return "-".join(parts)

    @property
    def max_blocks(self) -> int:
        return -(-self.s_k // self.block_size) + 1  # one more than is ever used

    @property
    def flops(self) -> int:
        return 2 * self.b * self.s_q * self.h_q * self.s_k * (self.d_qk + self.d_v)

    @property
    def cache_numbers(self) -> int:
        return self.b * self.s_k * self.h_kv * self.d_qk


@dataclasses.dataclass(frozen=True)
class DecodeInputs:
    q: np.ndarray  # [b, s_q, h_q, d_qk]
    keys: np.ndarray  # [b, s_k, h_kv, d_qk] the cache unpaged; anything past a sequence's length
    blocks: np.ndarray  # [num_blocks, block_size, h_kv, d_qk]
    block_table: np.ndarray  # [b, max_blocks]
    cache_seqlens: np.ndarray  # [b]

    @property
    def arguments(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        return self.q, self.blocks, self.block_table, self.cache_seqlens


def make_lengths(case: DecodeCase) -> np.ndarray:
    rng = np.random.default_rng([SEED, case.b, case.s_k])
    lengths = np.full(case.b, case.s_k)
    if case.ragged:
        lengths = rng.integers(1, case.s_k + 1, case.b)
        lengths[rng.integers(case.b)] = case.s_k
    if case.zero_lengths:
        lengths[rng.integers(3) :: 3] = 0
    return lengths.astype(np.int32)


def make_table(lengths: np.ndarray, block_size: int, max_blocks: int) -> tuple[np.ndarray, int]:
    """A table of shuffled blocks, each with one owner, and the number of blocks of the cache."""
    used = -(-lengths // block_size)
    num_blocks = int(used.sum()) + SPARE_BLOCKS
    table = np.full((len(lengths), max_blocks), UNUSED_ENTRY, np.int32)
    ids = np.random.default_rng([SEED, num_blocks]).permutation(num_blocks)
    table[np.arange(max_blocks)[None, :] < used[:, None]] = ids[: used.sum()]
    return table, num_blocks


def make_inputs(case: DecodeCase) -> DecodeInputs:
    rng = np.random.default_rng([SEED, case.b, case.h_q])
    lengths = make_lengths(case)
    table, num_blocks = make_table(lengths, case.block_size, case.max_blocks)
    keys = normal(rng, (case.b, case.s_k, case.h_kv, case.d_qk), case.dtype, ROW_SCALE)
    blocks = np.full((num_blocks, case.block_size, case.h_kv, case.d_qk), np.nan, keys.dtype)
    for i, length in enumerate(lengths):
        token = np.arange(length)
        block, offset = table[i, token // case.block_size], token % case.block_size
        blocks[block, offset] = keys[i, :length]
    q = normal(rng, (case.b, case.s_q, case.h_q, case.d_qk), case.dtype, QUERY_SCALE)
    return DecodeInputs(q, keys, blocks, table, lengths)


def normal(
    rng: np.random.Generator, shape: tuple[int, ...], dtype: str, scale: float = 1.0
) -> np.ndarray:
    return (scale * rng.standard_normal(shape, np.float32)).astype(jnp.dtype(dtype))


def naive_decode(case: DecodeCase, inputs: DecodeInputs) -> tuple[np.ndarray, np.ndarray]:
    results = [
        naive.dense(q, keys, int(length), d_v=case.d_v, causal=case.causal)
        for q, keys, length in zip(inputs.q, inputs.keys, inputs.cache_seqlens, strict=True)
    ]
    outs, lses = zip(*results, strict=True)
    return np.stack(outs), np.stack(lses)


# The space that FlashMLA's own dense tests sweep.

FLASHMLA_B = (1, 2, 6, 64)
FLASHMLA_S_Q = (1, 2, 4)
FLASHMLA_S_K = (20, 140, 4096)
FLASHMLA_H_Q = (1, 3, 9, 63, 64, 126, 128)
FLASHMLA_H_KV = (1, 2, 3, 8)


def flashmla_groups() -> Iterator[tuple[int, int, int, int]]:
    """(s_k, h_kv, s_q, h_q), those of one cache side by side."""
    for s_k, h_kv, s_q, h_q in itertools.product(
        FLASHMLA_S_K, FLASHMLA_H_KV, FLASHMLA_S_Q, FLASHMLA_H_Q
    ):
        if h_q % h_kv == 0:
            yield s_k, h_kv, s_q, h_q


def flashmla_cases() -> list[DecodeCase]:
    return [
        DecodeCase(b, s_q, s_k, h_q, h_kv, ragged=ragged, causal=causal)
        for s_k, h_kv, s_q, h_q in flashmla_groups()
        for ragged, causal, b in itertools.product((True, False), (True, False), FLASHMLA_B)
    ]


def flashmla_quarter() -> list[DecodeCase]:
    """A quarter of FlashMLA's space, in which any four values that occur together do so too."""
    masks = list(itertools.product((True, False), (True, False)))
    chosen = []
    for s_k, h_kv, s_q, h_q in flashmla_groups():
        turn = FLASHMLA_S_K.index(s_k) + FLASHMLA_S_Q.index(s_q) + FLASHMLA_H_Q.index(h_q)
        for i, b in enumerate(FLASHMLA_B):
            ragged, causal = masks[(i + turn) % 4]
            chosen.append(DecodeCase(b, s_q, s_k, h_q, h_kv, ragged=ragged, causal=causal))
    return chosen


def pairwise(candidates: list[DecodeCase], fields: tuple[str, ...]) -> list[DecodeCase]:
    """A few of the candidates in which every pair of values that occurs in them occurs."""

    def pairs(case: DecodeCase) -> set:
        values = [(field, getattr(case, field)) for field in fields]
        return set(itertools.combinations(values, 2))

    missing = set().union(*map(pairs, candidates))
    order = np.random.default_rng(SEED).permutation(len(candidates))
    shuffled = [candidates[i] for i in order]
    chosen = []
    while missing:
        best = max(shuffled, key=lambda case: len(pairs(case) & missing))
        chosen.append(best)
        missing -= pairs(best)
    return chosen


def cpu_cases() -> list[DecodeCase]:
    """FlashMLA's space, pairwise, less what takes long; and other dimensions and dtypes."""
    affordable = [
        case
        for case in flashmla_cases()
        if case.flops <= 3e9 and case.cache_numbers <= 2e7 and case.h_q * case.s_q * case.b <= 2048
    ]
    fields = ("b", "s_q", "s_k", "h_q", "h_kv", "ragged", "causal")
    return [
        *pairwise(affordable, fields),
        DecodeCase(128, 1, 100, 4, zero_lengths=True),
        DecodeCase(128, 2, 70, 3, zero_lengths=True, causal=True),
        DecodeCase(3, 4, 5, 2, causal=True),  # sequences shorter than s_q
        DecodeCase(2, 2, 300, 16, dtype="float16"),
        DecodeCase(2, 1, 300, 6, 2, causal=True, dtype="float16"),
        DecodeCase(2, 2, 300, 9, dtype="float32", causal=True),
        DecodeCase(3, 1, 300, 4, 2, d_qk=35, d_v=19, block_size=16, dtype="float32"),
        DecodeCase(2, 1, 300, 8, d_qk=320, d_v=256),
        DecodeCase(2, 1, 300, 8, d_qk=288, d_v=256, block_size=16),
        DecodeCase(2, 2, 130, 5, d_qk=7, d_v=3, block_size=5, causal=True),
        DecodeCase(2, 1, 20, 4, 2, d_qk=33, d_v=33, block_size=1),
        DecodeCase(2, 1, 700, 4, d_qk=512, d_v=512, block_size=256),
        DecodeCase(3, 2, 300, 9, 3, block_size=128, causal=True),
        DecodeCase(3, 1, 1000, 20, block_size=256, zero_lengths=True),
        DecodeCase(3, 2, 300, 9, 3, block_size=16, causal=True),
        DecodeCase(2, 1, 2000, 16, block_size=16),
        DecodeCase(3, 1, 1000, 20, block_size=32, zero_lengths=True),
        DecodeCase(2, 2, 700, 64, 2, block_size=32, causal=True),
    ]


# Dimensions that only the CPU and the reference take, for tests of what is around the operations.
SMALL_D_V = 16
small = functools.partial(DecodeCase, d_qk=24, d_v=SMALL_D_V, block_size=8)


def growing_cache(steps: int, b: int = 2) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """An empty cache, a table with room for `steps` tokens, and the rows [steps, b, 1, 1, 24]."""
    table = np.arange(b * -(-steps // 8), dtype=np.int32).reshape(b, -1)
    rows = normal(np.random.default_rng(SEED), (steps, b, 1, 1, 24), "bfloat16")
    blocks = np.full((table.size, 8, 1, 24), np.nan, rows.dtype)
    return blocks, table, rows


def attend_growing(rows: np.ndarray, q: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    keys = np.moveaxis(rows[:length, :, 0], 0, 1)  # [b, length, 1, 24]
    results = [naive.dense(q[i], keys[i], length, d_v=SMALL_D_V) for i in range(len(q))]
    outs, lses = zip(*results, strict=True)
    return np.stack(outs), np.stack(lses)
