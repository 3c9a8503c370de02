"""The projections of a decoding step, each one call that reads its weights once."""

from __future__ import annotations

import dataclasses
from typing import Any

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

# Of plain products with more rows than these, XLA picks ones as fast or faster. On an H100,
# 32 rows: 29.6 us for 33.9 (75 MB of weights), 85.7 for 85.6 (235 MB).
FEW_ROWS = 16


@dataclasses.dataclass(frozen=True)
class Projected:
    """What a step's tokens are projected down to.

    Attributes:
        inputs: what queries are projected from [b, s, q_lora_rank or hidden].
        index_key: what ends in the indexer's key before its norm [b, s, at least head_dim]; None
            without an indexer.
        cos, sin: of the tokens' angles [b * s, pairs] float32; None where nothing is rotated.
    """

    inputs: jax.Array
    index_key: jax.Array | None
    cos: jax.Array | None
    sin: jax.Array | None


def project_down(
    config: MLAConfig,
    params: MLAParams,
    x: jax.Array,
    cache: PagedCache,
    slots: Slots,
    layer: int | jax.Array | None,
    implementation: str | None,
) -> tuple[PagedCache, Projected]:
    """All that x [b, s, hidden] itself is multiplied with; the cache has the tokens' rows then."""
    cos = sin = None
    if config.rope.layout != "none":
        cos, sin = cos_and_sin(config, positions_of(slots))
        cos, sin = (a.reshape(x.shape[0] * x.shape[1], a.shape[-1]) for a in (cos, sin))
    if slots.share is not None:  # this device stores some of the tokens' rows
        latent, k_rope = project_rows(config, params, x, positions_of(slots))
        cache = write_rows(cache, latent, k_rope, slots, layer, implementation)
        return cache, Projected(query_inputs(config, params, x), None, cos, sin)
    names = ("w_dq", "w_dkv", "index_w_k")
    weights = [getattr(params, name) for name in names if getattr(params, name) is not None]
    down = multiply(x, *weights, implementation=implementation)
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
    key = None if params.index_w_k is None else down
    return cache, Projected(x if inputs is None else inputs, key, cos, sin)


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
) -> jax.Array:
    """Queries of latent attention [b, s, heads, d_qk]: up-projected, absorbed, rotated."""
    x = projected.inputs
    b, s, k = x.shape
    weight = (params.w_q if config.q_lora_rank is None else params.w_uq).astype(x.dtype)
    w_uk = params.w_uk.astype(x.dtype)
    heads, implementation = w_uk.shape[0], of_products(implementation)
    angles: dict[str, Any] = {
        "cos": projected.cos,
        "sin": projected.sin,
        "layout": config.rope.layout,
    }
    if b * s > FEW_ROWS:
        q = jnp.einsum("bsk,khd->bshd", x, weight).reshape(b * s, heads, -1)
        q = project(q, w_uk, **angles, implementation=implementation)
    else:
        weight = weight.reshape(1, k, -1)
        q = project_twice(
            x.reshape(b * s, 1, k), weight, w_uk, **angles, implementation=implementation
        )
    return q.reshape(b, s, heads, -1)


def project_values(params: MLAParams, out: jax.Array, implementation: str | None) -> jax.Array:
    """Weighted latents [b, s, heads, kv_lora_rank] to [b, s, hidden]; of these heads alone."""
    b, s, heads, _ = out.shape
    rows = out.reshape(b * s, heads, -1)
    w_uv = params.w_uv.astype(out.dtype)
    w_o = params.w_o.astype(out.dtype).reshape(1, -1, params.w_o.shape[-1])
    implementation = of_products(implementation)
    if b * s > FEW_ROWS:
        values = project(rows, w_uv, transposed=True, implementation=implementation)
        return jnp.einsum("bsk,kn->bsn", values.reshape(b, s, -1), w_o[0])
    y = project_twice(rows, w_uv, w_o, transposed=True, implementation=implementation)
    return y.reshape(b, s, -1)


def multiply(x: jax.Array, *weights: jax.Array, implementation: str | None) -> jax.Array:
    """x [b, s, k] times weights [k, ...], side by side: [b, s, ...]."""
    b, s, k = x.shape
    if b * s > FEW_ROWS and len(weights) == 1:
        w = weights[0].astype(x.dtype)
        y = jnp.einsum("bsk,kn->bsn", x, w.reshape(k, -1))
        return y.reshape(b, s, *w.shape[1:])
    flat = [w.reshape(1, k, -1).astype(x.dtype) for w in weights]
    y = project(x.reshape(b * s, 1, k), flat, implementation=of_products(implementation))
    return y.reshape(b, s, *(weights[0].shape[1:] if len(weights) == 1 else (-1,)))


def of_products(implementation: str | None) -> str | None:
    """project's: to insist on kernels is to insist on those of attention and the cache."""
    return None if implementation == "kernel" else implementation
