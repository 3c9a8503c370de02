"""PyTorch and FlashMLA's library as the benchmark sees them, of NumPy and our operations."""

from __future__ import annotations

import contextlib
import types
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jax_flashmla import CacheFormat, dense_decode, sparse_decode, sparse_prefill
from jax_flashmla.bench.live import FlashMLA

REPLAY_MS = 3.0
E4M3 = ml_dtypes.float8_e4m3fn


class Tensor:
    """A NumPy array under the names of PyTorch's methods that the benchmark calls."""

    device = "cuda:0"

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        self.shape = array.shape

    def view(self, *shape: Any) -> Tensor:
        """Of another dtype, or shape."""
        if type(shape[0]) is int:
            return Tensor(self.array.reshape(shape))
        return Tensor(self.array.view(shape[0]))

    def to(self, dtype: Any) -> Tensor:
        return Tensor(self.array.astype(dtype))

    def as_strided(self, shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
        assert self.array.itemsize == 1
        return Tensor(np.lib.stride_tricks.as_strided(self.array, shape, strides))

    def new_zeros(self, shape: list[int]) -> Tensor:
        return Tensor(np.zeros(shape, self.array.dtype))

    def narrow(self, dim: int, start: int, length: int) -> Tensor:
        return Tensor(self.array[(slice(None),) * dim + (slice(start, start + length),)])

    def copy_(self, other: Tensor) -> None:
        self.array[...] = other.array

    def float(self) -> Tensor:
        return self.to(np.float32)

    def cpu(self) -> np.ndarray:
        return self.array


def sparse_decode_fwd(q, kv, indices, topk_length, sink, metadata, splits, *rest):
    extra_kv, extra_indices, extra_lengths, d_v, sm_scale, kv_format = rest
    assert (topk_length, sink, extra_lengths, kv_format) == (None,) * 4
    assert q.shape[2] in (64, 128)
    assert (metadata, splits) in ((None, None), ("metadata", "splits"))
    assert kv.array.dtype == E4M3
    name = {576: "v32", 512: "v4"}[q.shape[3]]
    format = CacheFormat(name=name, block_size=kv.shape[1])
    assert kv.shape[2:] == (1, format.bytes_per_token)
    assert kv.array.strides == (format.block_bytes, *(format.bytes_per_token,) * 2, 1)
    blocks = np.lib.stride_tricks.as_strided(
        kv.array.view(np.uint8), (kv.shape[0], format.block_bytes), (format.block_bytes, 1)
    ).reshape(-1, *format.block_shape)
    extra = {}
    if extra_kv is not None:
        assert extra_kv is kv
        extra = {"extra_blocks": blocks, "extra_indices": extra_indices.array}
        extra["extra_format"] = format
    out, _ = sparse_decode(
        q.array, blocks, indices.array, format=format, d_v=d_v, sm_scale=sm_scale, **extra
    )
    return Tensor(np.asarray(out)), None, "metadata", "splits"


def sparse_prefill_fwd(q, kv, indices, sm_scale, d_v, sink, topk_length):
    assert (sink, topk_length) == (None, None)
    assert q.shape[1] in (64, 128)
    assert indices.shape[1] == 1
    out, lse, max_logits = sparse_prefill(
        q.array, kv.array, indices.array[:, 0], d_v=d_v, sm_scale=sm_scale
    )
    return tuple(Tensor(np.asarray(x)) for x in (out, max_logits, lse))


def dense_decode_fwd(q, kv, d_v, seqlens, table, sm_scale, causal, metadata, splits):
    assert (metadata, splits) in ((None, None), ("metadata", "splits"))
    out, _ = dense_decode(
        q.array,
        kv.array,
        table.array,
        seqlens.array,
        d_v=d_v,
        sm_scale=sm_scale,
        causal=causal,
    )
    return Tensor(np.asarray(out)), None, "metadata", "splits"


def fwd_kvcache_mla_fp8(q, kv, d_v, seqlens, table, sm_scale, causal, metadata, splits, dq, dk):
    assert (metadata, splits) == ("fp8 metadata", "fp8 splits")
    assert dq.array == dk.array == 1
    assert q.array.dtype == kv.array.dtype == E4M3
    rows = kv.array.astype(jnp.bfloat16)
    return dense_decode_fwd(
        q.to(jnp.bfloat16), Tensor(rows), d_v, seqlens, table, sm_scale, causal, None, None
    )[:2]


class Graph:
    """Takes REPLAY_MS a replay, on a clock that its events share."""

    def __init__(self) -> None:
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1

    def reset(self) -> None: ...

    def event(self, *, enable_timing: bool) -> Event:
        assert enable_timing
        return Event(self)


class Event:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph

    def record(self, stream: Any) -> None:
        self.at = self.graph.replays

    def elapsed_time(self, end: Event) -> float:
        return REPLAY_MS * (end.at - self.at)


def make(graph: Graph | None = None, **ops: Any) -> FlashMLA:
    """graph: the one that all calls are captured in; ops: those to replace."""
    graph = graph or Graph()
    cuda = types.SimpleNamespace(
        Stream=object,
        stream=contextlib.nullcontext,
        synchronize=lambda: None,
        empty_cache=lambda: None,
        CUDAGraph=lambda: graph,
        graph=lambda graph, stream: contextlib.nullcontext(),
        Event=graph.event,
    )
    torch = types.SimpleNamespace(
        cuda=cuda,
        float8_e4m3fn=E4M3,
        float32=np.float32,
        from_dlpack=lambda x: Tensor(np.asarray(x)),
        ones=lambda n, dtype, device: Tensor(np.ones(n, dtype)),
    )
    known = {
        "sparse_decode_fwd": sparse_decode_fwd,
        "sparse_prefill_fwd": sparse_prefill_fwd,
        "dense_decode_fwd": dense_decode_fwd,
        "fwd_kvcache_mla_fp8": fwd_kvcache_mla_fp8,
        "get_mla_decoding_metadata_dense_fp8": lambda lengths, rows, h_kv: (
            "fp8 metadata",
            "fp8 splits",
        ),
    }
    return FlashMLA(torch, types.SimpleNamespace(**{**known, **ops}))
