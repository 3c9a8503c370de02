"""Peers that are timed in the same run, on PyTorch: FlashMLA's frozen Hopper kernels.

They are in the package sgl-flash-mla, which PyTorch 2.10 or newer loads. Neither is ever needed but
for `bench --peers`. Arrays are JAX's own, so peers read the same bytes as our kernels. The
indexer's peers are in indexer/live_peer.py.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jax_flashmla.bench.measure import Method, take_samples

PACKAGE, LIBRARY = "flash_mla", "_C_legacy*.so"
PEER_HEADS = (64, 128)  # it has kernels for: others are padded


@dataclass(frozen=True)
class Torch:
    """PyTorch, which all peers run on."""

    torch: Any

    def tensor(self, x: Any) -> Any:
        """A jax.Array's memory as a tensor."""
        return self.torch.from_dlpack(x)

    def time_us(self, calls: Sequence[Callable[[], Any]], method: Method) -> float:
        """Microseconds a call, of a CUDA graph of the calls, timed as our kernels are."""
        cuda = self.torch.cuda
        stream = cuda.Stream()
        graph = cuda.CUDAGraph()

        def seconds_of(replays: int) -> float:
            start, end = (cuda.Event(enable_timing=True) for _ in range(2))
            start.record(stream)
            for _ in range(replays):
                graph.replay()
            end.record(stream)
            cuda.synchronize()
            return float(start.elapsed_time(end)) / 1e3

        # With the lead, though events have no beginning or end to take away: a hot GPU's clock
        # falls within a sample, so both are to have run as long before it.
        method = replace(method, sustained_seconds=0.0)
        with cuda.stream(stream):
            calls[0]()
            cuda.synchronize()
            with cuda.graph(graph, stream=stream):
                for call in calls:  # each result's memory is the next one's, as of ours
                    call()
            timing = take_samples(seconds_of, len(calls), method)
        graph.reset()
        cuda.empty_cache()  # the next shape's results may be as large, and JAX has most memory
        return timing.us


@dataclass(frozen=True)
class FlashMLA(Torch):
    """PyTorch, and the operations of FlashMLA's library."""

    ops: Any

    def padded(self, q: Any, dim: int = 2) -> Any:
        """Queries with as many heads as there is a kernel for."""
        heads = next(n for n in (*PEER_HEADS, q.shape[dim]) if n >= q.shape[dim])
        shape = list(q.shape)
        shape[dim] = heads
        padded = q.new_zeros(shape)
        padded.narrow(dim, 0, q.shape[dim]).copy_(q)
        return padded


def load_torch() -> Any:
    """
    Raises:
        ImportError: it is not there.
    """
    try:
        return importlib.import_module("torch")
    except ImportError:
        raise ImportError("--peers needs PyTorch, which is not installed") from None


def load() -> FlashMLA:
    """
    Raises:
        ImportError: PyTorch or FlashMLA's library is not there; the message says which.
    """
    found = importlib.util.find_spec(PACKAGE)
    folders = [] if found is None else found.submodule_search_locations or []
    libraries = [path for folder in folders for path in sorted(Path(folder).glob(LIBRARY))]
    if not libraries:
        raise ImportError(
            f"--peers needs {PACKAGE}/{LIBRARY} of the package sgl-flash-mla and found none: "
            "pip install --no-deps sgl-flash-mla"
        )
    torch = load_torch()
    torch.ops.load_library(str(libraries[0]))
    return FlashMLA(torch, torch.ops.flash_mla_legacy)
