"""Attention to selected tokens, in latent space, straight from the paged cache."""

from __future__ import annotations

import jax

from jax_flashmla import PagedCache, sparse_decode
from jax_flashmla.layers.config import MLAConfig
from jax_flashmla.layers.indexer import Selection


def attend_selected(
    config: MLAConfig,
    q: jax.Array,
    cache: PagedCache,
    layer: int | jax.Array | None,
    selection: Selection,
    implementation: str | None,
) -> jax.Array:
    """Absorbed queries [b, s, heads, d_qk] to [b, s, heads, kv_lora_rank] in the cache's dtype.

    A prompt's chunk goes the same way as a step: sparse_decode takes any s, and reads every format
    in place.
    """
    assert selection.slots is not None
    rows = cache.layer(layer)
    out, _ = sparse_decode(
        q.astype(cache.format.dtype),
        rows.blocks,
        selection.slots,
        format=rows.format,
        d_v=config.kv_lora_rank,
        sm_scale=config.sm_scale,
        topk_length=selection.lengths,
        first_block=rows.first_block,
        layer_blocks=rows.num_blocks,
        implementation=implementation,
    )
    return out
