"""Small calls whose results are known, one for each operation that attends or selects."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_flashmla
from jax_flashmla.bench.device import count_calls, platform_of


@dataclass(frozen=True)
class Probe:
    """One call over two blocks of 64 tokens, the second one first in the table."""

    arguments: Callable[[], tuple[Any, ...]]
    call: Callable[..., Any]
    is_right: Callable[[jax.Array], bool]


def _ones(*shape: int) -> np.ndarray:
    return np.ones(shape, jnp.bfloat16)


def _table() -> tuple[np.ndarray, np.ndarray]:
    return np.array([[1, 0]], np.int32), np.array([100], np.int32)


def _indices() -> np.ndarray:
    return np.arange(64, dtype=np.int32)[None]


def _scores() -> np.ndarray:
    """The tokens 7, 70 and 99 score highest of those that are visible."""
    scores = np.zeros((1, 1, 128), np.float32)
    scores[..., [7, 70, 99, 100]] = [3, 2, 1, 4]
    return scores


def _all_one(out: jax.Array) -> bool:
    """Every cached value is 1, so every mean of values is."""
    return bool((np.asarray(out) == 1).all())


PROBES = {  # the calls look operations up when they run
    "dense_decode": Probe(
        lambda: (_ones(1, 1, 16, 576), _ones(2, 64, 1, 576), *_table()),
        lambda *arguments: jax_flashmla.dense_decode(*arguments)[0],
        _all_one,
    ),
    "sparse_decode": Probe(
        lambda: (_ones(1, 1, 64, 576), _ones(2, 64, 1, 576), _indices()[None]),
        lambda *arguments: jax_flashmla.sparse_decode(*arguments)[0],
        _all_one,
    ),
    "sparse_prefill": Probe(
        lambda: (_ones(1, 64, 576), _ones(128, 1, 576), _indices()),
        lambda *arguments: jax_flashmla.sparse_prefill(*arguments)[0],
        _all_one,
    ),
    "index_topk": Probe(
        lambda: (*_table(), _scores()),
        lambda table, lengths, scores: jax_flashmla.index_topk(
            None, None, None, table, lengths, format=None, topk=3, scores=scores
        ),
        lambda slots: np.asarray(slots).tolist() == [[[64 + 7, 70 - 64, 99 - 64]]],
    ),
}


def run(name: str, device: jax.Device) -> tuple[str, bool]:
    """Compiles and runs a probe there: what ran or went wrong, and whether it was right."""
    probe = PROBES[name]
    try:
        with jax.default_device(device):
            arguments = jax.device_put(probe.arguments(), device)
            call = jax.jit(lambda *arguments: probe.call(*arguments))  # not one traced before
            compiled = call.lower(*arguments).compile()
            is_right = probe.is_right(compiled(*arguments))
    except Exception as error:  # whatever fails is the answer to the user's question
        return f"fails: {type(error).__name__}: {error}", False
    platform, target = platform_of(device), f"flashmla_{name}_v1"
    if calls := count_calls(compiled, target):
        verdict = f"{platform} kernel, custom call {target} x {calls}"
    else:
        reason = jax_flashmla.kernel_refusal(platform) or "the kernel was not asked for"
        verdict = f"pure-JAX reference ({reason})"
    return verdict + ("" if is_right else ", WRONG RESULT"), is_right
