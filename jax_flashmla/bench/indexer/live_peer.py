"""DeepGEMM's logits and SGLang's top-k beside ours.

DeepGEMM is the package sgl-deep-gemm (with apache-tvm-ffi; it compiles its kernels at the first
call), SGLang's top-k a library of sglang-kernel. Each is timed where it is installed.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jax_flashmla.bench.indexer.shapes import BLOCK_SIZE, KEY_BYTES, ScoresShape, TopkShape
from jax_flashmla.bench.live import Torch, load_torch

LIBRARY = "sm90/common_ops*.so"
MAX_QUERIES, TOPK = 2, 2048  # that they have kernels for
HEADS = (32, 64)


@dataclass(frozen=True)
class Indexers(Torch):
    """PyTorch, and those of the peers that are installed."""

    deep_gemm: Any
    fast_topk: Any


def load() -> Indexers:
    """
    Raises:
        ImportError: PyTorch or both peers are not there; the message says which.
    """
    found = importlib.util.find_spec("sgl_kernel")
    folders = [] if found is None else found.submodule_search_locations or []
    libraries = [path for folder in folders for path in sorted(Path(folder).glob(LIBRARY))]
    has_deep_gemm = importlib.util.find_spec("deep_gemm") is not None
    if not libraries and not has_deep_gemm:
        raise ImportError(
            "--peers of the indexer needs sgl-deep-gemm or sglang-kernel and found neither: "
            "pip install --no-deps sgl-deep-gemm apache-tvm-ffi sglang-kernel"
        )
    torch = load_torch()
    fast_topk = None
    if libraries:
        torch.ops.load_library(str(libraries[0]))
        fast_topk = torch.ops.sgl_kernel.fast_topk
    deep_gemm = importlib.import_module("deep_gemm") if has_deep_gemm else None
    return Indexers(torch, deep_gemm, fast_topk)


def peer_calls(
    shape: ScoresShape, arguments: tuple[Any, ...], peer: Indexers
) -> list[Callable[[], Any]]:
    """As `operation.CallsPeer`; the argument is the shape's Inputs."""
    (inputs,) = arguments
    scores = shape.heads > 0
    if isinstance(shape, TopkShape) and (peer.fast_topk is None or shape.topk != TOPK):
        return []
    if scores and (peer.deep_gemm is None or shape.s_q > MAX_QUERIES or shape.heads not in HEADS):
        return []
    if scores:
        logits = _logits(inputs, peer, shape.s_k)
    else:
        given = [peer.tensor(x).view(shape.b * shape.s_q, -1) for x in inputs.scores]
        logits = [partial(lambda x: x, x) for x in given]
    if not isinstance(shape, TopkShape):
        # All of our calls' scores are alive until the last one, each in memory of its own.
        alive: list[Any] = []
        return [partial(_keep, alive, call) for call in logits]
    rows = shape.b * shape.s_q
    query = np.arange(rows, dtype=np.int32) % shape.s_q
    seen = _tensor(peer, shape.s_k - (shape.s_q - 1 - query), inputs)
    positions = seen.new_zeros((rows, shape.topk))

    def select(logits: Callable[[], Any]) -> Any:
        peer.fast_topk(logits(), positions, seen, None)
        return positions

    return [partial(select, call) for call in logits]


def _keep(alive: list[Any], call: Callable[[], Any]) -> Any:
    """The call's result, which lives as long as the calls do."""
    alive.append(call())
    return alive[-1]


def _tensor(peer: Indexers, x: np.ndarray, beside: Any) -> Any:
    """An array of the host's, on the inputs' device."""
    return peer.tensor(jax.device_put(x, beside.q.sharding))


def _logits(inputs: Any, peer: Indexers, s_k: int) -> list[Callable[[], Any]]:
    torch, deep_gemm = peer.torch, peer.deep_gemm
    codes = np.asarray(inputs.q).view(np.uint8)  # DLPack has no e4m3
    q = _tensor(peer, codes, inputs).view(torch.float8_e4m3fn)
    b, s_q, heads, _ = q.shape
    weights = peer.tensor(inputs.weights).view(b * s_q, heads)
    blocks = peer.tensor(inputs.blocks).view(-1, BLOCK_SIZE, 1, KEY_BYTES)
    query = np.arange(s_q, dtype=np.int32)[None]
    seen = np.asarray(inputs.cache_seqlens)[:, None] - (s_q - 1 - query)  # each query's own
    seqlens = _tensor(peer, seen, inputs)
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    schedule = deep_gemm.get_paged_mqa_logits_metadata(seqlens, BLOCK_SIZE, multiprocessors)

    def score(table: Any) -> Any:
        return deep_gemm.fp8_paged_mqa_logits(
            q, blocks, weights, seqlens, table, schedule, s_k, False
        )

    return [partial(score, peer.tensor(table)) for table in inputs.tables]
