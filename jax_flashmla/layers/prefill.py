"""Prefill in expanded form: keys and values of every head, attended like ordinary attention."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from jax_flashmla import PagedCache, Slots, merge_lse
from jax_flashmla.layers.attend import attend_cached, attend_selected
from jax_flashmla.layers.config import MLAConfig
from jax_flashmla.layers.decode import absorb_queries, unabsorb_values
from jax_flashmla.layers.indexer import Selection, selection_for
from jax_flashmla.layers.params import MLAParams
from jax_flashmla.layers.project import (
    check_call,
    positions_of,
    project_output,
    project_queries,
    project_rows,
    write_rows,
)


def prefill(
    config: MLAConfig,
    params: MLAParams,
    x: jax.Array,
    cache: PagedCache,
    *,
    slots: Slots,
    layer: int | jax.Array | None = None,
    prefix: bool = True,
    selection: Selection | None = None,
    heads_axis: str | None = None,
    context_axis: str | None = None,
    implementation: str | None = None,
) -> tuple[PagedCache, jax.Array]:
    """Attention of a prompt, or a chunk of it, to all tokens up to themselves.

    It writes the rows of the tokens to the cache. Among themselves the tokens attend in expanded
    form, through `jax.nn.dot_product_attention`. To what the cache held before, they attend in
    latent space, as `decode` does, and the two are merged by their log-sum-exps. Where tokens are
    selected, there may be other ones for each query, which attends to them as in `decode`.

    Args:
        config: the layer.
        params: its parameters; cast to x's dtype.
        x: the tokens [b, s, hidden_size], floating; padded at the end with anything finite.
        cache: the cache, after the step's `advance(s, num_new)`; of any dtype.
        slots: what `advance` gave. Of sequence i, the first slots.num_new[i] tokens count: rows of
            y past them are finite, and mean nothing.
        layer: which layer of the cache; may be traced. May be left out if there is one.
        prefix: whether any sequence may have tokens in the cache already. False is faster, and
            wrong where one has: `slots.positions` must be 0.
        selection: as for `decode`; its `select` must have been given the same prefix.
        heads_axis: inside `jax.shard_map`, the mesh axis that splits heads; y is summed over it.
        context_axis: as for `decode`; each of its devices is given all tokens.
        implementation: as for `dense_decode` and `cache_append`.

    Returns:
        cache: with the new rows.
        y: [b, s, hidden_size] in x's dtype.

    Raises:
        TypeError, ValueError: an argument is not as described.
    """
    check_call(config, params, x, cache, slots, heads_axis, context_axis)
    x = jnp.asarray(x)
    positions = positions_of(slots)
    latent, k_rope = project_rows(config, params, x, positions)
    cache = write_rows(cache, latent, k_rope, slots, layer, implementation)
    q_nope, q_rope = project_queries(config, params, x, positions)

    cache, selection = selection_for(
        selection, config, params, x, cache, slots, layer, heads_axis, context_axis, implementation,
        prefix=prefix,
    )  # fmt: skip
    if selection.slots is not None:
        q = jnp.concatenate([absorb_queries(params, q_nope), q_rope], axis=-1)
        out = attend_selected(
            config, q, cache, layer, selection, heads_axis, context_axis, None, implementation
        )
        attended = unabsorb_values(params, out.astype(x.dtype))
        return cache, project_output(params, attended, heads_axis)

    k_nope = jnp.einsum("bsc,hdc->bshd", latent, params.w_uk.astype(x.dtype))
    values = jnp.einsum("bsc,hvc->bshv", latent, params.w_uv.astype(x.dtype))
    k_rope = jnp.broadcast_to(k_rope[:, :, None, :], q_rope.shape)
    q = jnp.concatenate([q_nope, q_rope], axis=-1)
    k = jnp.concatenate([k_nope, k_rope], axis=-1)
    if not prefix:
        attended = _attend(q, k, values, config.sm_scale)
        return cache, project_output(params, attended, heads_axis)

    chunk, chunk_lse = _attend_with_lse(q, k, values, config.sm_scale)
    q_latent = jnp.concatenate([absorb_queries(params, q_nope), q_rope], axis=-1)
    rows = dataclasses.replace(cache.layer(layer), cache_seqlens=slots.positions)
    earlier, earlier_lse = attend_cached(  # to the tokens before the chunk
        config,
        q_latent.astype(cache.format.dtype),
        rows,
        heads_axis,
        context_axis,
        None,
        implementation=implementation,
    )
    earlier = unabsorb_values(params, earlier.astype(x.dtype))
    attended, _ = merge_lse([earlier, chunk], [earlier_lse, chunk_lse])
    return cache, project_output(params, attended, heads_axis)


def _attend(q: jax.Array, k: jax.Array, values: jax.Array, sm_scale: float) -> jax.Array:
    """Causal attention: q, k [b, s, heads, qk], values [b, s, heads, v] -> [b, s, heads, v]."""
    d, d_v = q.shape[-1], values.shape[-1]
    width = max(d, d_v)  # jax.nn.dot_product_attention takes keys and values of one width
    q, k, padded = (
        jnp.pad(a, ((0, 0), (0, 0), (0, 0), (0, width - a.shape[-1]))) for a in (q, k, values)
    )
    with jax.numpy_dtype_promotion("standard"):  # it promotes bfloat16 to float32 implicitly
        attended = jax.nn.dot_product_attention(
            q, k, padded, scale=sm_scale, is_causal=True, implementation=_attention_library(q)
        )
    return attended[..., :d_v]


def _attention_library(q: jax.Array) -> Literal["cudnn", "xla"]:
    """cuDNN where JAX's default device is a Hopper or newer and cuDNN takes q, else XLA."""
    device = jax.config.jax_default_device or jax.local_devices()[0]  # type: ignore[attr-defined]
    platform = device if isinstance(device, str) else device.platform
    if platform not in ("gpu", "cuda"):
        return "xla"
    capability = jax.local_devices(backend="cuda")[0].compute_capability
    takes = q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[-1] <= 256 and q.shape[-1] % 8 == 0
    return "cudnn" if takes and float(capability) >= 9.0 else "xla"


def _attend_with_lse(
    q: jax.Array, k: jax.Array, values: jax.Array, sm_scale: float
) -> tuple[jax.Array, jax.Array]:
    """As `_attend`, and the log-sum-exp of the scores, float32 [b, s, heads].

    jax.nn.dot_product_attention can return it too, but rounded to q's dtype (jax 0.10 to 0.12):
    in bfloat16 a merging weight would be off by percents.
    """
    s = q.shape[1]
    scores = jnp.einsum("bihd,bjhd->bhij", q, k, preferred_element_type=jnp.float32)
    token = jnp.arange(s, dtype=jnp.int32)
    seen = token[None, :] <= token[:, None]
    scores = jnp.where(seen[None, None], scores * jnp.float32(sm_scale), -jnp.inf)
    lse = jax.nn.logsumexp(scores, axis=-1)  # [b, heads, s]
    weights = jnp.exp(scores - lse[..., None]).astype(values.dtype)
    attended = jnp.einsum("bhij,bjhv->bihv", weights, values)
    return attended, jnp.transpose(lse, (0, 2, 1))
