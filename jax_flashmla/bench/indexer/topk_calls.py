"""index_topk's functions, from keys or from given scores, and its error."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import numpy as np

import jax_flashmla
from jax_flashmla.bench.indexer.inputs import (
    FORMAT,
    Inputs,
    compose_scores,
    last_scores,
    make_inputs,
    make_pool,
    memory,
)
from jax_flashmla.bench.indexer.shapes import TopkShape
from jax_flashmla.bench.operation import Calls, Timed
from jax_flashmla.bench.pools import Pool
from jax_flashmla.bench.setup import Setup

__all__ = ["MAX_RELATIVE_ERROR", "TARGET", "make_calls", "make_pool", "memory"]

MAX_RELATIVE_ERROR = 1e-4  # what the selected scores' sum lacks of the best's
TARGET = "flashmla_index_topk_v1"
BASELINE_CALLS = 2


@partial(jax.jit, static_argnames=("topk", "implementation"))
def _package(inputs: Inputs, *, topk: int, implementation: str) -> tuple[jax.Array, Any]:
    """The last call's positions, and a slot of each call."""
    results = []
    for call, table in enumerate(inputs.tables):
        given = bool(inputs.scores)
        results.append(
            jax_flashmla.index_topk(
                None if given else inputs.q,
                None if given else inputs.weights,
                None if given else inputs.blocks,
                table,
                inputs.cache_seqlens,
                format=None if given else FORMAT,
                scores=inputs.scores[call] if given else None,
                topk=topk,
                return_positions=True,
                implementation=implementation,
            )
        )
    return results[-1][1], sum(slots[0, 0, 0] for slots, _ in results)


@partial(jax.jit, static_argnames="topk")
def _composed(inputs: Inputs, *, topk: int) -> list[jax.Array]:
    q, weights, blocks, seqlens, tables, given = inputs
    scores = given or [compose_scores(q, weights, blocks, table, seqlens) for table in tables]
    return [jax.lax.top_k(x, min(topk, x.shape[-1]))[1] for x in scores]


def make_calls(shape: TopkShape, pool: Pool, setup: Setup, *, with_xla: bool) -> Calls:
    """The kernel's calls and, with_xla, plain XLA's; on a CPU also the pure-JAX reference's."""
    inputs = make_inputs(shape, pool, setup)
    package = partial(_package, topk=shape.topk)
    baselines = {}
    if with_xla:
        few = inputs._replace(
            tables=inputs.tables[:BASELINE_CALLS], scores=inputs.scores[:BASELINE_CALLS]
        )
        baselines["xla"] = Timed(partial(_composed, topk=shape.topk), (few,), BASELINE_CALLS)
        if setup.device.platform == "cpu":
            reference = partial(package, implementation="xla")
            baselines["reference"] = Timed(reference, (few,), BASELINE_CALLS)
    return Calls(
        Timed(partial(package, implementation="kernel"), (inputs,), setup.calls(shape)),
        lambda result: relative_error(result[0], shape, inputs),
        baselines,
    )


def relative_error(positions: Any, shape: TopkShape, inputs: Inputs) -> float:
    """What the last query token's selected scores lack; a peer's positions are not in order.

    Scores that the kernel and this compute apart may change places at the end of the selection.
    """
    scores = last_scores(shape, inputs)
    got = np.asarray(positions).reshape(-1, shape.topk)[-1].astype(np.int64)
    got = np.unique(got[(got >= 0) & (got < shape.s_k)])
    best = np.sort(scores)[::-1][: shape.topk]
    if len(got) != len(best):
        return float("inf")
    return float((best.sum() - scores[got].sum()) / np.abs(best).sum())
