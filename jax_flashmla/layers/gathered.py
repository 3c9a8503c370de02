"""Attention of a prompt's chunk to selected tokens through rows gathered from the paged cache."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jax_flashmla import PagedCache, sparse_prefill
from jax_flashmla.cache.pool import LayerView
from jax_flashmla.layers.config import MLAConfig
from jax_flashmla.layers.indexer import Selection
from jax_flashmla.reference.rows import load_rows

# A chunk's rows are gathered where each is attended this often on average: a row costs a copy once,
# and saves each time what sparse_prefill's tiles of 64 heads are faster by. On an H100, v32, 128
# heads: 1.3 ns a row of 131,072, 0.135 ns an attention.
GATHER_REUSE = 10
GATHER_HEADS = 33  # below, sparse_decode's smaller tiles are faster


def pays_to_gather(q: jax.Array, selection: Selection, rows: LayerView) -> bool:
    """Whether a chunk is attended through gathered rows: by its shapes alone."""
    assert selection.slots is not None
    _, s, heads, _ = q.shape
    width = rows.block_table.shape[1] * rows.format.block_size
    return heads >= GATHER_HEADS and s * selection.slots.shape[-1] >= GATHER_REUSE * width


def attend_gathered(
    config: MLAConfig,
    q: jax.Array,
    cache: PagedCache,
    rows: LayerView,
    selection: Selection,
    implementation: str | None,
) -> jax.Array:
    """sparse_prefill of absorbed queries [b, s, heads, d_qk] in the cache's dtype."""
    assert selection.slots is not None
    kv, indices = _gather(rows, cache.table.block_table, selection.slots)
    b, s, *row = q.shape
    out, _, _ = sparse_prefill(
        q.reshape(b * s, *row),
        kv,
        indices.reshape(b * s, -1),
        d_v=config.kv_lora_rank,
        sm_scale=config.sm_scale,
        topk_length=None if selection.lengths is None else selection.lengths.reshape(b * s),
        implementation=implementation,
    )
    return out.reshape(b, s, *out.shape[1:])


def _gather(
    rows: LayerView, block_table: jax.Array, slots: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The rows of all of the table's blocks [rows, 1, d_qk], in the format's dtype, and which of
    them the slots [b, s, topk] are; -1 for those of no block of the table.

    Args:
        block_table: [b, max_blocks], unshifted: what slots go by.
    """
    format = rows.format
    size = format.block_size
    ids = jnp.clip(rows.block_table, 0, rows.blocks.shape[0] - 1)
    kv = load_rows(format, rows.blocks[ids], jnp.float32(1)).reshape(-1, 1, format.d_qk)
    # A block of several sequences is gathered for each, and any of the copies will do.
    entries = jnp.arange(block_table.size, dtype=jnp.int32)
    flat = block_table.reshape(-1)
    inside = jnp.where(flat < 0, rows.num_blocks, flat)  # what is out of range is dropped
    entry_of = jnp.full(rows.num_blocks, -1, jnp.int32).at[inside].set(entries, mode="drop")
    block = jnp.where(slots < 0, rows.num_blocks, slots // size)
    entry = entry_of.at[block].get(mode="fill", fill_value=-1)
    return kv.astype(format.dtype), jnp.where(entry < 0, -1, entry * size + slots % size)
