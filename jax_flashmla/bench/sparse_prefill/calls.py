"""Builds a shape's rows and indices and the functions that attend to them; checks a result."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_flashmla
from jax_flashmla.bench.ahead import Lowered, Programs
from jax_flashmla.bench.attention_error import attention_error, heads_at
from jax_flashmla.bench.gather import take
from jax_flashmla.bench.noise import host_normal, normal, runs
from jax_flashmla.bench.operation import Calls, Timed
from jax_flashmla.bench.setup import Setup
from jax_flashmla.bench.sparse_prefill.shapes import D_V, ITEMSIZE, Shape

MAX_RELATIVE_ERROR = 1e-2  # of one output row in the 2-norm; bf16 rounding of P and out gives 2e-3
TARGET = "flashmla_sparse_prefill_v1"
BASELINE_CALLS = 2  # separate arrays for the baselines: fewer, because XLA compiles every call
XLA_QUERIES = 128  # whose rows plain XLA gathers at once

Sources = list[tuple[jax.Array, jax.Array]]  # of each call kv and indices


def memory(shape: Shape, setup: Setup) -> int:
    """Bytes of device memory: rows, indices, q, outs; the baselines' gathered rows."""
    rows = setup.caches(shape) * shape.s_kv * shape.row_bytes
    indices = setup.caches(shape) * shape.gathered_tokens * 4
    q_and_outs = shape.s_q * shape.h_q * ITEMSIZE * (shape.d_qk + 2 * D_V)
    return rows + indices + q_and_outs + 2 * XLA_QUERIES * shape.topk * shape.row_bytes


def make_pool(shapes: list[Shape], setup: Setup) -> None:
    """Shapes share nothing."""
    del shapes, setup


def make_sources(shape: Shape, setup: Setup) -> Sources:
    """Random rows, and of each query token `topk` different ones in random order.

    All calls' are the same, each in arrays of its own.
    """
    kv = host_normal((shape.s_kv, 1, shape.d_qk), setup.dtype, seed=1)
    generator = np.random.default_rng(2)
    order = generator.permutation(shape.s_kv)
    indices = runs(order, generator.integers(shape.s_kv, size=shape.s_q), shape.topk)
    return [jax.device_put((kv, indices), setup.device) for _ in range(setup.caches(shape))]


@partial(jax.jit, static_argnames="implementation")
def package_prefill(q: jax.Array, sources: Sources, implementation: str) -> tuple[jax.Array, Any]:
    """One call for each source, through jax_flashmla, and the sum of one lse each: so every out
    gets the same memory, as in a model."""
    results = [
        jax_flashmla.sparse_prefill(q, *source, implementation=implementation) for source in sources
    ]
    return results[-1][0], sum(lse[0, 0] for _, lse, _ in results)


@jax.jit
def composed_prefill(q: jax.Array, sources: Sources) -> tuple[jax.Array, list[jax.Array]]:
    """What a JAX user writes without it: gather and two einsums, some query tokens at a time."""

    def attend(kv: jax.Array, one: tuple[jax.Array, jax.Array]) -> jax.Array:
        q, indices = one
        rows = kv[indices, 0]
        scores = jnp.einsum("hd,kd->hk", q, rows, preferred_element_type=jnp.float32)
        p = jax.nn.softmax(scores * q.shape[-1] ** -0.5)
        return jnp.einsum("hk,kd->hd", p.astype(q.dtype), rows[:, :D_V])

    outs = [
        jax.lax.map(partial(attend, kv), (q, indices), batch_size=XLA_QUERIES)
        for kv, indices in sources
    ]
    return outs[-1], outs


def programs(shape: Shape, pool: None, setup: Setup, *, with_xla: bool) -> Lowered:
    """The kernel's calls; with_xla plain XLA's, and on a CPU the pure-JAX reference's."""
    del pool
    q = jax.ShapeDtypeStruct((shape.s_q, shape.h_q, shape.d_qk), setup.dtype)
    source = (
        jax.ShapeDtypeStruct((shape.s_kv, 1, shape.d_qk), setup.dtype),
        jax.ShapeDtypeStruct((shape.s_q, shape.topk), jnp.int32),
    )
    calls = setup.calls(shape)
    few = [source] * min(BASELINE_CALLS, calls)
    found = {"kernel": package_prefill.lower(q, [source] * calls, "kernel")}
    if with_xla:
        found["xla"] = composed_prefill.lower(q, few)
        if setup.device.platform == "cpu":
            found["reference"] = package_prefill.lower(q, few, "xla")
    return found


def make_calls(shape: Shape, pool: None, setup: Setup, programs: Programs) -> Calls:
    """The shape's rows, indices and q."""
    del pool
    q = normal((shape.s_q, shape.h_q, shape.d_qk), setup.dtype, setup.device)
    made = make_sources(shape, setup)
    calls = setup.calls(shape)
    sources = made * (calls // len(made))
    few = sources[:BASELINE_CALLS]
    return Calls(
        Timed(programs["kernel"], (q, sources), calls),
        lambda result: relative_error(result[0], q, *sources[-1]),
        {
            name: Timed(programs[name], (q, few), len(few))
            for name in ("xla", "reference")
            if name in programs
        },
    )


def relative_error(out: Any, q: jax.Array, kv: jax.Array, indices: jax.Array) -> float:
    """The worst head's error, of the last query token, against naive attention."""
    scale = q.shape[-1] ** -0.5
    got, asked = heads_at(out, -1), heads_at(q, -1)
    rows = np.asarray(take(kv, np.asarray(indices)[-1]))[:, 0]
    return attention_error(got, asked, rows, d_v=D_V, sm_scale=scale)
