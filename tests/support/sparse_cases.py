"""The cases of sparse attention, and the hostile caches and indices that they are made of.

Only rows that an index names within its length are stored; every other byte is poison, other
layers included. Among the indices are ones outside the layer; past the lengths stands anything.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

import cases
import naive
from jax_flashmla import CacheFormat
from stored import KV_SCALE, poisoned_blocks, rounded, store


@dataclasses.dataclass(frozen=True)
class Cache:
    name: str
    s_k: int = 512  # rows to choose from
    topk: int = 64
    block_size: int = 64
    layers: int = 1  # of the array; the last but one is attended

    @property
    def layer_blocks(self) -> int:
        return -(-self.s_k // self.block_size)

    @property
    def first_block(self) -> int:
        return max(self.layers - 2, 0) * self.layer_blocks

    def format(self, dtype: str, d_qk: int) -> CacheFormat:
        if self.name == "dense":
            d_v = min(d_qk, 512)
            return CacheFormat(d_qk=d_qk, d_v=d_v, block_size=self.block_size, dtype=dtype)
        return CacheFormat(name=self.name, block_size=self.block_size, dtype=dtype)


@dataclasses.dataclass(frozen=True)
class SparseCase:
    main: Cache
    extra: Cache | None = None
    b: int = 4
    s_q: int = 1
    h_q: int = 8
    d_qk: int = 576  # of dense caches
    d_v: int = 512
    dtype: str = "bfloat16"
    lengths: str | None = None  # "b" or "b s_q"
    sink: bool = False
    all_invalid: bool = False
    first_invalid: bool = False  # all indices of the first sequence
    sm_scale: float | None = None

    def __str__(self) -> str:
        parts = []
        for cache in self.caches:
            parts.append(f"{cache.name}_{cache.s_k}_{cache.topk}_{cache.block_size}")
        parts += [f"b{self.b}", f"sq{self.s_q}", f"hq{self.h_q}", self.dtype]
        parts += [f"len[{self.lengths}]"] if self.lengths else []
        parts += ["sink"] if self.sink else []
        parts += ["invalid"] if self.all_invalid else []
        return "-".join(parts)

    @property
    def caches(self) -> list[Cache]:
        return [self.main] if self.extra is None else [self.main, self.extra]

    @property
    def formats(self) -> list[CacheFormat]:
        return [cache.format(self.dtype, self.d_qk) for cache in self.caches]


@dataclasses.dataclass(frozen=True)
class Problem:
    case: SparseCase
    arguments: dict[str, Any]  # of sparse_decode
    expected: tuple[np.ndarray, np.ndarray]


def hostile_indices(slots: int) -> list[int]:
    return [-1, -(2**31), 2**31 - 1, slots, slots + 1, -123456, 2147480000]


def make_indices(
    rng: np.random.Generator, case: SparseCase, cache: Cache
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """indices [b, s_q, topk], lengths as they are passed, and which of the indices count."""
    slots = cache.layer_blocks * cache.block_size
    shape = (case.b, case.s_q, cache.topk)
    indices = np.full(shape, -1)
    for i in np.ndindex(shape[:2]):
        chosen = rng.permutation(slots)[: min(cache.topk, cache.s_k)]
        indices[i][: len(chosen)] = chosen
    flat = indices.reshape(-1)
    where = rng.permutation(flat.size)
    some = max(flat.size // 16, 1)
    flat[where[:some]] = flat[where[some : 2 * some]]  # rows named twice, for other queries too
    flat[where[-some:]] = rng.choice(hostile_indices(slots), some)
    if case.all_invalid:
        flat[:] = rng.choice(hostile_indices(slots), flat.size)
    if case.first_invalid:
        indices[0] = rng.choice(hostile_indices(slots), shape[1:])
    lengths = None
    within = np.full(shape, True)
    if case.lengths:
        lengths = rng.integers(0, cache.topk + 1, (case.b, case.s_q))
        lengths.reshape(-1)[:: max(lengths.size // 2, 1)] = rng.choice([-5, 0, cache.topk + 9])
        if case.lengths == "b":
            lengths = lengths[:, 0]
        each = lengths if lengths.ndim == 2 else lengths[:, None]
        within = np.broadcast_to(np.arange(cache.topk) < each[..., None], shape)
    valid = within & (indices >= 0) & (indices < slots)
    return indices.astype(np.int32), None if lengths is None else lengths.astype(np.int32), valid


def make_problem(case: SparseCase) -> Problem:
    rng = np.random.default_rng([cases.SEED, case.b, case.h_q, case.main.topk])
    arguments: dict[str, Any] = {"d_v": case.d_v, "sm_scale": case.sm_scale}
    gathered, masks = [], []
    for prefix, cache, format in zip(("", "extra_"), case.caches, case.formats, strict=False):
        indices, lengths, valid = make_indices(rng, case, cache)
        blocks = poisoned_blocks(format, cache.layer_blocks * cache.layers)
        slots = cache.layer_blocks * cache.block_size
        named = np.unique(indices[valid])
        rows = cases.normal(rng, (len(named), format.d_qk), case.dtype, cases.ROW_SCALE)
        store(format, blocks, rows[:, None], named + cache.first_block * cache.block_size)
        values = np.zeros((slots, format.d_qk), np.float32)
        if len(named):
            values[named] = rounded(format, rows)
        gathered.append(values[np.where(valid, indices, 0)])
        masks.append(valid)
        arguments |= {
            f"{prefix}blocks": blocks,
            f"{prefix}indices": indices,
            f"{prefix}topk_length": lengths,
            f"{prefix}format": None if cache.name == "dense" else format,
        }
        if cache.layers > 1:
            arguments[f"{prefix}first_block"] = cache.first_block
            arguments[f"{prefix}layer_blocks"] = cache.layer_blocks
        if cache.name == "fp8_row":
            arguments["kv_scale"] = KV_SCALE
    d_qk = case.formats[0].d_qk
    q = cases.normal(rng, (case.b, case.s_q, case.h_q, d_qk), case.dtype, cases.QUERY_SCALE)
    sink = None
    if case.sink:
        sink = rng.standard_normal(case.h_q).astype(np.float32)
        sink[rng.random(case.h_q) < 1 / 3] = np.inf
        sink[rng.random(case.h_q) < 1 / 3] = -np.inf
    arguments |= {"q": q, "attn_sink": sink}
    return Problem(case, arguments, naive_of(case, q, gathered, masks, sink))


def naive_of(
    case: SparseCase,
    q: np.ndarray,
    gathered: list[np.ndarray],
    masks: list[np.ndarray],
    sink: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray]:
    out = np.zeros((*q.shape[:-1], case.d_v))
    lse = np.zeros(q.shape[:-1])
    for i in np.ndindex(q.shape[:2]):
        rows, mask = (np.concatenate([x[i] for x in xs]) for xs in (gathered, masks))
        out[i], lse[i] = naive.attend(
            q[i], rows, d_v=case.d_v, sm_scale=case.sm_scale, mask=mask, sink=sink
        )
    return out, lse


# FlashMLA's own decode tests: (rows to choose from, topk, block size).
SPACE = [
    (512, 64, 2),
    (512, 64, 64),
    (512, 64, 69),
    (1024, 576, 2),
    (1024, 576, 61),
    (2046, 2048, 2),
    (2046, 2048, 64),
    (2046, 2048, 576),
]
CORNERS = [(512, 64, 61), (650, 576, 53)]


def sparse_cases() -> list[SparseCase]:
    """FlashMLA's space scaled down in b, every format, pair and block size; other dimensions."""
    found = []
    alone = ["v32", "v4", "v32_nope", "v41", "dense", "fp8_row"]
    for i, name in enumerate([*alone, "v32", "v4", "dense"]):
        found.append(
            SparseCase(
                Cache(name, *SPACE[i % len(SPACE)], layers=1 + 2 * (i % 2)),
                b=4 if i < 5 else 2,
                s_q=(1, 3)[i // 2 % 2],
                h_q=(64, 8, 128, 20, 1)[i % 5],
                lengths=(None, "b", "b s_q")[i % 3],
                sink=i % 4 != 3,
                dtype="float16" if i in (5, 6) else "bfloat16",
                d_qk=512 if i > 6 else 576,
                sm_scale=(None, 576**-0.55)[i % 2],
            )
        )
    pairs = [("v4", "v4"), ("v41", "v41_fp4"), ("dense", "dense"), ("v41", "v41")]
    for i, (name, extra) in enumerate([*pairs, pairs[0]]):
        found.append(
            SparseCase(
                Cache(name, *SPACE[i], layers=1 + i % 3),
                Cache(extra, *SPACE[(3 * i + 2) % len(SPACE)], layers=1 + (i + 1) % 3),
                b=2,
                s_q=(3, 1)[i % 2],
                h_q=(16, 64, 5)[i % 3],
                lengths=("b", None, "b s_q")[i % 3],
                sink=i % 2 == 0,
                dtype="float16" if i == 1 else "bfloat16",
                d_qk=512 if i < 4 else 576,
            )
        )
    for i, corner in enumerate(CORNERS):
        main = Cache("v32", *corner)
        found.append(SparseCase(main, s_q=1 + i, h_q=64, all_invalid=True, sink=True))
        name, extra = (("v41", "v41_fp4"), ("v4", "v4"))[i]
        main, extra = Cache(name, *corner), Cache(extra, *CORNERS[1 - i])
        found.append(SparseCase(main, extra, s_q=3, all_invalid=True))
    return [
        *found,
        SparseCase(Cache("dense", 100, 70, 8), d_qk=24, d_v=16, dtype="float32", lengths="b s_q"),
        SparseCase(Cache("dense", 100, 1, 1), Cache("dense", 9, 130, 5), d_qk=35, d_v=7, sink=True),
    ]


def hopper_cases() -> list[SparseCase]:
    """FlashMLA's space of v32 in full, with any number of heads."""
    heads = (64, 128, 16, 1, 8, 20, 32, 96)
    return [
        SparseCase(
            Cache("v32", *space, layers=1 + 2 * (i % 2)),
            b=(4, 74)[i % 5 == 0],
            s_q=s_q,
            h_q=heads[(3 * i + j) % len(heads)],
            lengths=(None, "b s_q")[j // 2],
            sink=(i + j) % 3 > 0,
            first_invalid=True,
        )
        for i, space in enumerate([*SPACE, *CORNERS])
        for j, s_q in enumerate((1, 3, 1, 3))
    ]
