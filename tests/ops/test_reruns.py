"""Sparse attention and selection have equal bits over 200 runs; a single rerun has each case."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

import index_cases
import sparse_cases
from index_cases import IndexCase
from jax_flashmla import index_scores, index_topk, sparse_decode, sparse_prefill
from sparse_cases import Cache, SparseCase

RERUNS = 200
V4 = SparseCase(Cache("v4", 400, 128), Cache("v4", 400, 100), b=5, h_q=64, d_qk=512)
SPARSE = [
    *(SparseCase(Cache("v32", 400, 300), b=5, h_q=h_q, lengths="b") for h_q in (16, 64, 128)),
    V4,
]


def check(run: Callable[..., Any], arguments: dict[str, Any]) -> None:
    arrays = {k: v for k, v in arguments.items() if isinstance(v, np.ndarray | jax.Array)}
    options = {k: v for k, v in arguments.items() if k not in arrays}
    jitted = jax.jit(functools.partial(run, **options))
    arrays = jax.device_put(arrays)
    first = jax.tree.map(np.asarray, jitted(**arrays))
    for _ in range(RERUNS):
        again = jitted(**arrays)
        for x, y in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True):
            assert x.tobytes() == np.asarray(y).tobytes()


@pytest.mark.parametrize("case", SPARSE, ids=str)
def test_sparse_decode(case: SparseCase, kernel: str) -> None:
    arguments = sparse_cases.make_problem(case).arguments
    check(functools.partial(sparse_decode, implementation=kernel), arguments)


@pytest.mark.parametrize("s_q", [1, 2, 4])
def test_index_scores_and_topk(s_q: int, kernel: str) -> None:
    made = index_cases.make_problem(IndexCase(b=3, s_q=s_q, heads=64))
    check(functools.partial(index_scores, implementation=kernel), made.arguments)
    options = {"topk": made.case.topk, "implementation": kernel}
    check(functools.partial(index_topk, **options), made.arguments)


@pytest.mark.parametrize("h_q", [64, 128])
def test_sparse_prefill(h_q: int, kernel: str) -> None:
    rng = np.random.default_rng(h_q)
    arguments = {
        "q": rng.standard_normal((5, h_q, 576), np.float32).astype("bfloat16"),
        "kv": rng.standard_normal((300, 1, 576), np.float32).astype("bfloat16"),
        "indices": rng.integers(-1, 300, (5, 200), np.int32),
        "sm_scale": 0.05,
    }
    check(functools.partial(sparse_prefill, d_v=512, implementation=kernel), arguments)
