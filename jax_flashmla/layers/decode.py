"""Decoding in absorbed form: attention in latent space, over the paged cache."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jax_flashmla import PagedCache, Peers, Slots, SplitSchedule
from jax_flashmla._xla.chain import chain
from jax_flashmla.layers.absorb import AbsorbedWeights
from jax_flashmla.layers.attend import attend_cached, attend_selected
from jax_flashmla.layers.config import MLAConfig
from jax_flashmla.layers.indexer import Selection, selection_for
from jax_flashmla.layers.params import MLAParams
from jax_flashmla.layers.project import (
    check_call,
    heads_per_device,
    positions_of,
    roll_tokens,
    sum_over_heads,
)
from jax_flashmla.layers.rope import rotate
from jax_flashmla.layers.step import latent_queries, multiply, project_down, project_values


def decode(
    config: MLAConfig,
    params: MLAParams,
    x: jax.Array,
    cache: PagedCache,
    *,
    slots: Slots,
    layer: int | jax.Array | None = None,
    schedule: SplitSchedule | None = None,
    absorbed: AbsorbedWeights | None = None,
    selection: Selection | None = None,
    heads_axis: str | None = None,
    peers: Peers | None = None,
    context_axis: str | None = None,
    implementation: str | None = None,
) -> tuple[PagedCache, jax.Array]:
    """Attention of a few new tokens per sequence to all tokens up to themselves, or the selected.

    It writes the new tokens' rows to the cache, and attends in latent space: W_UK is applied to the
    queries and W_UV to the result, so that no key or value of a head is ever made.

    Args:
        config: the layer.
        params: its parameters; cast to x's dtype.
        x: the new tokens [b, s_q, hidden_size], floating.
        cache: the cache, after the step's `advance(s_q)`; of any dtype.
        slots: what `advance` gave. Of sequence i, the first slots.num_new[i] tokens count: rows of
            y past them are finite, and mean nothing.
        layer: which layer of the cache; may be traced. May be left out if there is one.
        schedule: the step's schedule, of `cache.table.schedule(h_q=heads, s_q=s_q,
            format=cache.format)`; made here by default. It is of dense attention, and not used
            where tokens are selected. With context_axis it is given
            context, and the heads of all its devices where heads_axis is the same.
        absorbed: precomputed products of weights, from `absorb`, to be used in place of params'.
        selection: what this layer or an earlier one has selected for these tokens, from `select`.
            By default the layer selects for itself, where the cache has an index pool with as many
            layers as itself, and attends to all tokens where it has none.
        heads_axis: inside `jax.shard_map`, the mesh axis that splits heads; y is summed over it.
        peers: from `connect_peers(mesh, heads_axis)`: the sum is then made over peer memory where
            `all_reduce_sum` can, and else, as without them, by `jax.lax.psum`.
        context_axis: inside `jax.shard_map`, the mesh axis that shares out each sequence's tokens,
            to which `advance` was given it too. It may be the axis of heads; `peers` then exchange
            what attention needs, too.
        implementation: as for `dense_decode`.

    Returns:
        cache: with the new rows.
        y: [b, s_q, hidden_size] in x's dtype.

    Raises:
        TypeError, ValueError: an argument is not as described.
    """
    check_call(config, params, x, cache, slots, heads_axis, context_axis)
    run = functools.partial(
        _decode,
        config,
        heads_axis=heads_axis,
        peers=peers,
        context_axis=context_axis,
        implementation=implementation,
    )
    return chain(run, params, jnp.asarray(x), cache, slots, layer, schedule, absorbed, selection)


def _decode(
    config: MLAConfig,
    params: MLAParams,
    x: jax.Array,
    cache: PagedCache,
    slots: Slots,
    layer: int | jax.Array | None,
    schedule: SplitSchedule | None,
    absorbed: AbsorbedWeights | None,
    selection: Selection | None,
    *,
    heads_axis: str | None,
    peers: Peers | None,
    context_axis: str | None,
    implementation: str | None,
) -> tuple[PagedCache, jax.Array]:
    """As `decode`, past its checks."""
    num_heads = heads_per_device(config, heads_axis)
    cache, down = project_down(
        config, params, x, cache, slots, layer, implementation, indexed=selection is None
    )
    if absorbed is None:
        q, index_q = latent_queries(config, params, down, implementation)
        down = dataclasses.replace(down, index_q=index_q)
    else:
        absorbed.check(config, num_heads)
        q, _ = multiply(down.inputs, absorbed.w_q, implementation=implementation)
        q_latent, q_rope = jnp.split(q, [config.kv_lora_rank], axis=-1)
        q = jnp.concatenate([q_latent, rotate(config, q_rope, positions_of(slots))], axis=-1)
    q = q.astype(cache.format.dtype)

    cache, selection = selection_for(
        selection, config, params, x, cache, slots, layer, heads_axis, context_axis, implementation,
        down=down,
    )  # fmt: skip
    if selection.slots is not None:
        out = attend_selected(
            config, q, cache, layer, selection, heads_axis, context_axis, peers, implementation
        )
    else:
        # dense_decode's last query is a sequence's last token: move the padding to the front.
        padding = slots.s_new - slots.num_new
        out, _ = attend_cached(
            config,
            roll_tokens(q, padding),
            cache.layer(layer),
            heads_axis,
            context_axis,
            peers,
            causal=True,
            schedule=schedule,
            implementation=implementation,
        )
        out = roll_tokens(out, -padding)
    out = out.astype(x.dtype)

    if absorbed is None:
        y = project_values(params, out, implementation)
    else:
        w_o = absorbed.w_o.reshape(-1, config.hidden_size)
        y, _ = multiply(out.reshape(*x.shape[:2], -1), w_o, implementation=implementation)
    return cache, sum_over_heads(y, heads_axis, peers)


def absorb_queries(params: MLAParams, q_nope: jax.Array) -> jax.Array:
    """Queries of latent keys: [b, s, heads, nope] to [b, s, heads, kv_lora_rank]."""
    return jnp.einsum("bshd,hdc->bshc", q_nope, params.w_uk.astype(q_nope.dtype))


def unabsorb_values(params: MLAParams, out: jax.Array) -> jax.Array:
    """Weighted latents to weighted values: [b, s, heads, kv_lora_rank] to [b, s, heads, v]."""
    return jnp.einsum("bshc,hvc->bshv", out, params.w_uv.astype(out.dtype))
