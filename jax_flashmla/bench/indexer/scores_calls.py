"""index_scores' functions, and its error."""

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
from jax_flashmla.bench.indexer.shapes import ScoresShape
from jax_flashmla.bench.operation import Calls, Timed
from jax_flashmla.bench.pools import Pool
from jax_flashmla.bench.setup import Setup

__all__ = ["MAX_RELATIVE_ERROR", "TARGET", "make_calls", "make_pool", "memory", "programs"]

MAX_RELATIVE_ERROR = 1e-3  # of a query token's scores in the 2-norm
TARGET = "flashmla_index_scores_v1"
BASELINE_CALLS = 2


@partial(jax.jit, static_argnames="implementation")
def _package(inputs: Inputs, *, implementation: str) -> tuple[jax.Array, Any]:
    """The last call's scores, and one of each of the others."""
    results = [
        jax_flashmla.index_scores(
            inputs.q,
            inputs.weights,
            inputs.blocks,
            table,
            inputs.cache_seqlens,
            format=FORMAT,
            implementation=implementation,
        )
        for table in inputs.tables
    ]
    return results[-1], sum(scores[0, 0, 0] for scores in results)


@jax.jit
def _composed(inputs: Inputs) -> list[jax.Array]:
    q, weights, blocks, seqlens, tables, _ = inputs
    return [compose_scores(q, weights, blocks, table, seqlens) for table in tables]


def programs(shape: ScoresShape, pool: Pool, setup: Setup, *, with_xla: bool) -> Lowered:
    """The kernel's calls; with_xla plain XLA's, and on a CPU the pure-JAX reference's."""
    inputs = abstract_inputs(shape, pool, setup.calls(shape))
    few = inputs._replace(tables=inputs.tables[:BASELINE_CALLS])
    found = {"kernel": _package.lower(inputs, implementation="kernel")}
    if with_xla:
        found["xla"] = _composed.lower(few)
        if setup.device.platform == "cpu":
            found["reference"] = _package.lower(few, implementation="xla")
    return found


def make_calls(shape: ScoresShape, pool: Pool, setup: Setup, programs: Programs) -> Calls:
    """The shape's keys, queries and tables."""
    inputs = make_inputs(shape, pool, setup)
    few = inputs._replace(tables=inputs.tables[:BASELINE_CALLS])
    return Calls(
        Timed(programs["kernel"], (inputs,), setup.calls(shape)),
        lambda result: relative_error(result[0], shape, inputs),
        {
            name: Timed(programs[name], (few,), BASELINE_CALLS)
            for name in ("xla", "reference")
            if name in programs
        },
    )


def relative_error(scores: Any, shape: ScoresShape, inputs: Inputs) -> float:
    """Of the last query token's scores; a peer's are [b * s_q, tokens]."""
    expected = last_scores(shape, inputs)
    got = np.asarray(scores).reshape(shape.b * shape.s_q, -1)[-1, : shape.s_k].astype(np.float64)
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))
