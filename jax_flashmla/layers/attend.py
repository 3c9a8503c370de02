"""Attention in latent space to the paged cache: to all tokens, or to selected ones.

Where a mesh axis shares out the tokens, over those of all its devices. Heads that are split over
the same axis are gathered for it, and the results handed back.
"""

from __future__ import annotations

from typing import Any

import jax

from jax_flashmla import PagedCache, Peers, context, dense_decode, sparse_decode
from jax_flashmla.cache.pool import LayerView
from jax_flashmla.layers.config import MLAConfig
from jax_flashmla.layers.gathered import attend_gathered, pays_to_gather
from jax_flashmla.layers.indexer import Selection


def attend_cached(
    config: MLAConfig,
    q: jax.Array,
    rows: LayerView,
    heads_axis: str | None,
    context_axis: str | None,
    peers: Peers | None,
    **options: Any,
) -> tuple[jax.Array, jax.Array]:
    """dense_decode of absorbed queries [b, s, heads, d_qk] in the cache's dtype."""
    options |= {"format": rows.format, "d_v": config.kv_lora_rank, "sm_scale": config.sm_scale}
    if context_axis is None:
        return dense_decode(q, *rows, **options)
    shared = heads_axis == context_axis
    return context.dense_decode(
        q, *rows, axis=context_axis, heads_split=shared, peers=peers if shared else None, **options
    )


def attend_selected(
    config: MLAConfig,
    q: jax.Array,
    cache: PagedCache,
    layer: int | jax.Array | None,
    selection: Selection,
    heads_axis: str | None,
    context_axis: str | None,
    peers: Peers | None,
    implementation: str | None,
) -> jax.Array:
    """Absorbed queries [b, s, heads, d_qk] to [b, s, heads, kv_lora_rank] in the cache's dtype.

    A step reads every format in place; a prompt's chunk too, unless it attends its rows so often
    that gathering them pays.
    """
    assert selection.slots is not None
    rows = cache.layer(layer)
    q = q.astype(cache.format.dtype)
    if context_axis is None and pays_to_gather(q, selection, rows):
        return attend_gathered(config, q, cache, rows, selection, implementation)
    options: dict[str, Any] = {
        "format": rows.format,
        "d_v": config.kv_lora_rank,
        "sm_scale": config.sm_scale,
        "topk_length": selection.lengths,
        "first_block": rows.first_block,
        "layer_blocks": rows.num_blocks,
        "implementation": implementation,
    }
    if context_axis is None:
        out, _ = sparse_decode(q, rows.blocks, selection.slots, **options)
    else:
        shared = heads_axis == context_axis
        out, _ = context.sparse_decode(
            q, rows.blocks, selection.slots, axis=context_axis, heads_split=shared,
            peers=peers if shared else None, **options,
        )  # fmt: skip
    return out
