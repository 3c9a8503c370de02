"""index_topk's functions, from keys or from given scores, and its error."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import numpy as np

import jax_flashmla
from jax_flashmla.bench.ahead import Lowered, Programs
from jax_flashmla.bench.indexer.inputs import (
    FORMAT,
    Inputs,
    abstract_inputs,
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

__all__ = ["MAX_RELATIVE_ERROR", "TARGET", "make_calls", "make_pool", "memory", "programs"]

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


def _few(inputs: Inputs) -> Inputs:
    """Of a few calls: the baselines'."""
    tables, scores = inputs.tables[:BASELINE_CALLS], inputs.scores[:BASELINE_CALLS]
    return inputs._replace(tables=tables, scores=scores)


def programs(shape: TopkShape, pool: Pool, setup: Setup, *, with_xla: bool) -> Lowered:
    """The kernel's calls; with_xla plain XLA's, and on a CPU the pure-JAX reference's."""
    inputs = abstract_inputs(shape, pool, setup.calls(shape))
    few, topk = _few(inputs), shape.topk
    found = {"kernel": _package.lower(inputs, topk=topk, implementation="kernel")}
    if with_xla:
        found["xla"] = _composed.lower(few, topk=topk)
        if setup.device.platform == "cpu":
            found["reference"] = _package.lower(few, topk=topk, implementation="xla")
    return found


def make_calls(shape: TopkShape, pool: Pool, setup: Setup, programs: Programs) -> Calls:
    """The shape's keys or scores, queries and tables."""
    inputs = make_inputs(shape, pool, setup)
    few = _few(inputs)
    return Calls(
        Timed(programs["kernel"], (inputs,), setup.calls(shape)),
        lambda result: relative_error(result[0], shape, inputs),
        {
            name: Timed(programs[name], (few,), BASELINE_CALLS)
            for name in ("xla", "reference")
            if name in programs
        },
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
