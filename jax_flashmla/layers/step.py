"""The projections of a decoding step, each one call that reads its weights once."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jax_flashmla import PagedCache, Slots, latent_append, project, project_twice
from jax_flashmla.layers.config import MLAConfig
from jax_flashmla.layers.params import MLAParams
from jax_flashmla.layers.project import (
    positions_of,
    project_rows,
    query_inputs,
    write_rows,
)
from jax_flashmla.layers.rope import cos_and_sin


@dataclasses.dataclass(frozen=True)
class Projected:
    """What a step's tokens are projected down to.

    Attributes:
        inputs: what queries are projected from [b, s, q_lora_rank or hidden].
        index_key: what ends in the indexer's key before its norm [b, s, at least head_dim]; None
            without an indexer, or with a selection that is given.
        index_weights: the weights of the indexer's heads [b, s, index_heads] float32, without the
            scale of the scores; None where nothing is selected.
        index_q: its queries before their rotation, if they have been made already, or None.
        cos, sin: of the tokens' angles [b * s, pairs] float32; None where nothing is rotated.
    """

    inputs: jax.Array
    index_key: jax.Array | None
    index_weights: jax.Array | None
    cos: jax.Array | None
    sin: jax.Array | None
    index_q: jax.Array | None = None


def project_down(
    config: MLAConfig,
    params: MLAParams,
    x: jax.Array,
    cache: PagedCache,
    slots: Slots,
    layer: int | jax.Array | None,
    implementation: str | None,
    *,
    indexed: bool,
) -> tuple[PagedCache, Projected]:
    """All that x [b, s, hidden] itself is multiplied with; the cache has the tokens' rows then.

    Args:
        indexed: whether the layer selects for itself; with a selection that it is given, nothing is
            multiplied with its indexer's weights.
    """
    cos = sin = None
    if config.rope.layout != "none":
        cos, sin = cos_and_sin(config, positions_of(slots))
        cos, sin = (a.reshape(x.shape[0] * x.shape[1], a.shape[-1]) for a in (cos, sin))
    if slots.share is not None:  # this device stores some of the tokens' rows
        latent, k_rope = project_rows(config, params, x, positions_of(slots))
        cache = write_rows(cache, latent, k_rope, slots, layer, implementation)
        return cache, Projected(query_inputs(config, params, x), None, None, cos, sin)
    index_key = params.index_w_k if indexed else None
    weights = [w for w in (params.w_dq, params.w_dkv, index_key) if w is not None]
    exact = params.index_w_weights if indexed and selects(config, cache) else None
    down, index_weights = multiply(x, *weights, exact=exact, implementation=implementation)
    view = cache.layer(layer)
    blocks, inputs = latent_append(
        view.blocks,
        down,
        params.kv_norm,
        None if cos is None else cos.reshape(*x.shape[:2], cos.shape[-1]),
        None if sin is None else sin.reshape(*x.shape[:2], sin.shape[-1]),
        view.block_table,
        slots.positions,
        layout=config.rope.layout,
        q_norm=None if params.q_norm is None else params.q_norm.astype(params.kv_norm.dtype),
        q_eps=config.q_norm_eps,
        kv_eps=config.kv_norm_eps,
        latent_scale=config.kv_scale,
        num_new=slots.num_new,
        format=view.format,
        implementation=implementation,
    )
    cache = dataclasses.replace(cache, blocks=replace_layer(cache.blocks, layer, blocks))
    key = None if index_key is None else down
    return cache, Projected(x if inputs is None else inputs, key, index_weights, cos, sin)


def selects(config: MLAConfig, cache: PagedCache) -> bool:
    """Whether a token may see more than the indexer selects."""
    if config.indexer is None or cache.index_blocks is None:
        return False
    return cache.table.max_seqlen > config.indexer.topk


def replace_layer(
    blocks: jax.Array | tuple[jax.Array, ...], layer: int | jax.Array | None, new: jax.Array
) -> jax.Array | tuple[jax.Array, ...]:
    """A pool's blocks with a layer's array, which may be that of all layers."""
    if not isinstance(blocks, tuple):
        return new
    i = 0 if layer is None else int(layer)
    return (*blocks[:i], new, *blocks[i + 1 :])


def latent_queries(
    config: MLAConfig, params: MLAParams, projected: Projected, implementation: str | None
) -> tuple[jax.Array, jax.Array | None]:
    """Queries of latent attention and, where the indexer selects, its own.

    Returns:
        q: up-projected, absorbed and rotated [b, s, heads, d_qk].
        index_q: before their rotation [b, s, index_heads, head_dim], or None.
    """
    x = projected.inputs
    b, s, k = x.shape
    weight = params.w_q if config.q_lora_rank is None else params.w_uq
    beside = None
    if projected.index_weights is not None:
        beside = params.index_w_q.reshape(1, k, -1).astype(x.dtype)
    queries = project_twice(
        x.reshape(b * s, 1, k),
        weight.reshape(1, k, -1).astype(x.dtype),
        params.w_uk.astype(x.dtype),
        beside=beside,
        cos=projected.cos,
        sin=projected.sin,
        layout=config.rope.layout,
        implementation=of_products(implementation),
    )
    if isinstance(queries, tuple):
        q, index_q = queries
        return q.reshape(b, s, *q.shape[1:]), index_q.reshape(b, s, *params.index_w_q.shape[1:])
    return queries.reshape(b, s, *queries.shape[1:]), None


def project_values(params: MLAParams, out: jax.Array, implementation: str | None) -> jax.Array:
    """Weighted latents [b, s, heads, kv_lora_rank] to [b, s, hidden]; of these heads alone."""
    b, s, heads, _ = out.shape
    y = project_twice(
        out.reshape(b * s, heads, -1),
        params.w_uv.astype(out.dtype),
        params.w_o.reshape(1, -1, params.w_o.shape[-1]).astype(out.dtype),
        transposed=True,
        implementation=of_products(implementation),
    )
    assert isinstance(y, jax.Array)
    return y.reshape(b, s, -1)


def multiply(
    x: jax.Array,
    *weights: jax.Array,
    exact: jax.Array | None = None,
    implementation: str | None,
) -> tuple[jax.Array, jax.Array | None]:
    """x [b, s, k] times weights [k, ...], side by side: [b, s, ...]; and times `exact` [k, n]."""
    b, s, k = x.shape
    flat = [w.reshape(1, k, -1).astype(x.dtype) for w in weights]
    wide = None if exact is None else exact.astype(jnp.float32)[None]
    result = project(
        x.reshape(b * s, 1, k), flat, exact=wide, implementation=of_products(implementation)
    )
    y, products = result if isinstance(result, tuple) else (result, None)
    y = y.reshape(b, s, *(weights[0].shape[1:] if len(weights) == 1 else (-1,)))
    return y, None if products is None else products.reshape(b, s, -1)


def of_products(implementation: str | None) -> str | None:
    """project's: to insist on kernels is to insist on those of attention and the cache."""
    return None if implementation == "kernel" else implementation
