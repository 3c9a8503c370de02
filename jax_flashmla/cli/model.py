"""The demo's model: a small decoder with random weights whose attention is paged MLA."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jax_flashmla import CacheFormat, PagedCache, dense_decode, make_schedule
from jax_flashmla.cli.workload import Workload

HIDDEN, VOCABULARY = 256, 512
QUERY_GAIN = 3.0  # makes attention peaked, as in trained models: scores have this deviation


class Layer(NamedTuple):
    query: jax.Array  # [HIDDEN, heads * d_qk], W_UK already absorbed
    row: jax.Array  # [HIDDEN, d_qk], to the latent and the rotary key
    output: jax.Array  # [heads * d_v, HIDDEN], W_UV already absorbed


class Weights(NamedTuple):
    embedding: jax.Array  # [VOCABULARY, HIDDEN]
    layers: tuple[Layer, ...]


class Trace(NamedTuple):
    """What the attention of one step was given and gave, for the check; layers stacked."""

    rows: jax.Array  # [layers, b, 1, d_qk]
    q: jax.Array  # [layers, b, heads, d_qk]
    out: jax.Array  # [layers, b, heads, d_v]
    lse: jax.Array  # [layers, b, heads] f32


Step = Callable[[Weights, jax.Array, PagedCache], tuple[PagedCache, jax.Array, Trace]]


def init_weights(workload: Workload, format: CacheFormat) -> Weights:
    """Random weights that keep every activation near unit size."""

    @jax.jit
    def init(key: jax.Array) -> Weights:
        def matrix(key: jax.Array, rows: int, columns: int, gain: float = 1.0) -> jax.Array:
            return gain * rows**-0.5 * jax.random.normal(key, (rows, columns), format.dtype)

        def layer(key: jax.Array) -> Layer:
            query, row, output = jax.random.split(key, 3)
            return Layer(
                matrix(query, HIDDEN, workload.heads * format.d_qk, QUERY_GAIN),
                matrix(row, HIDDEN, format.d_qk),
                matrix(output, workload.heads * format.d_v, HIDDEN),
            )

        keys = jax.random.split(key, workload.layers + 1)
        embedding = jax.random.normal(keys[0], (VOCABULARY, HIDDEN), format.dtype)
        return Weights(embedding, tuple(layer(key) for key in keys[1:]))

    return init(jax.random.key(workload.seed))


def make_step(heads: int, format: CacheFormat) -> Step:
    """One decoding step: every sequence's last token in, its next token out, the cache longer."""

    def step(
        weights: Weights, tokens: jax.Array, cache: PagedCache
    ) -> tuple[PagedCache, jax.Array, Trace]:
        b = tokens.shape[0]
        cache, slots = cache.advance()
        schedule = make_schedule(
            cache.table.cache_seqlens, h_q=heads, max_seqlen=cache.table.max_seqlen
        )
        x = weights.embedding[tokens].astype(jnp.float32)
        traces = []
        for i, layer in enumerate(weights.layers):
            y = _unit_size(x).astype(format.dtype)
            q = (y @ layer.query).reshape(b, 1, heads, format.d_qk)
            row = (y @ layer.row).reshape(b, 1, 1, format.d_qk)
            cache = cache.write(row, slots, layer=i)
            out, lse = dense_decode(q, *cache.layer(i), d_v=format.d_v, schedule=schedule)
            attended = out.reshape(b, heads * format.d_v) @ layer.output
            x = x + _unit_size(attended.astype(jnp.float32))
            traces.append(Trace(row[:, :, 0], q[:, 0], out[:, 0], lse[:, 0]))
        logits = _unit_size(x).astype(format.dtype) @ weights.embedding.T
        trace = jax.tree.map(lambda *layers: jnp.stack(layers), *traces)
        return cache, jnp.argmax(logits, axis=-1).astype(jnp.int32), trace

    return step


def _unit_size(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)
