"""Debugging aids on the host: what a cache is, and what can be wrong with its table's values."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from jax_flashmla import _checks
from jax_flashmla.cache.table import BlockTable


def check_table(table: BlockTable, overflow: jax.Array, num_blocks: int) -> list[str]:
    """What is wrong, a sentence each: see `PagedCache.check`. num_blocks: of a layer.

    Where the table is split over devices, block ids count from the device's own first block, of
    which there are num_blocks / devices: each device's sequences are checked apart. Where the
    table's columns are split, so are each sequence's tokens: of the devices of one batch, the
    r-th of n has every n-th from the r-th on.
    """
    _checks.refuse_donated("cache", (table, overflow))
    batches, ranks = _slices(table.block_table, 0), _slices(table.block_table, 1)
    found = []
    for rows in batches:
        for rank, columns in enumerate(ranks):
            lengths = np.asarray(table.cache_seqlens)[rows].astype(np.int64)
            found += _check_shard(
                np.asarray(table.block_table)[rows, columns],
                -((rank - lengths) // len(ranks)),
                np.asarray(overflow)[rows] if rank == 0 else np.zeros(0, np.int32),
                table.block_size,
                num_blocks // (len(batches) * len(ranks)),
                rows.start,
            )
    return found


def describe(cache: Any) -> str:
    """A PagedCache in a line, without its values; or its fields, where leaves are no arrays, as in
    a tree of PartitionSpecs."""
    leaves = jax.tree.leaves((cache.blocks, cache.table), is_leaf=lambda x: x is None)
    if not all(hasattr(x, "shape") for x in leaves):
        fields = (f"{x.name}={getattr(cache, x.name)!r}" for x in dataclasses.fields(cache))
        return f"PagedCache({', '.join(fields)})"
    b, max_blocks = cache.table.block_table.shape
    index = "" if cache.index_blocks is None else f", index_format={cache.index_format}"
    return (
        f"PagedCache(b={b}, max_blocks={max_blocks}, num_blocks={cache.num_blocks}, "
        f"layers={cache.layers}, format={cache.format}{index})"
    )


def _slices(block_table: jax.Array, axis: int) -> list[slice]:
    """Where the shards of a table [b, max_blocks] lie along an axis."""
    indices = block_table.sharding.devices_indices_map(block_table.shape).values()
    size = block_table.shape[axis]
    return [slice(*x) for x in sorted({index[axis].indices(size)[:2] for index in indices})]


def _check_shard(
    ids: np.ndarray,
    seqlens: np.ndarray,
    overflow: np.ndarray,
    size: int,
    num_blocks: int,
    first: int,
) -> list[str]:
    max_blocks = ids.shape[1]
    in_range = (ids >= 0) & (ids < num_blocks)
    found = []
    for i in np.flatnonzero((seqlens < 0) | (seqlens > max_blocks * size)):
        found.append(
            f"sequence {first + i} has {seqlens[i]} tokens, its table holds 0 to "
            f"{max_blocks * size}"
        )
    covered = np.clip(-(-seqlens.astype(np.int64) // size), 0, max_blocks)
    column = np.arange(max_blocks)
    for i, j in np.argwhere(~in_range & (column < covered[:, None])):
        found.append(
            f"sequence {first + i} reads block {ids[i, j]} at entry {j}, the cache has blocks 0 to "
            f"{num_blocks - 1}"
        )
    # Appends write to entries from length // block_size on, and only read those before.
    written = in_range & (column >= np.clip(seqlens // size, 0, max_blocks)[:, None])
    holders = np.bincount(ids[in_range], minlength=num_blocks)
    for i, j in np.argwhere(written):
        if holders[ids[i, j]] > 1:
            others = sorted({first + int(k) for k in np.argwhere(ids == ids[i, j])[:, 0] if k != i})
            found.append(
                f"sequence {first + i} writes block {ids[i, j]} at entry {j}, "
                + (f"which sequences {others} hold" if others else "which it holds twice")
            )
    for i in np.flatnonzero(overflow):
        found.append(f"sequence {first + i} dropped {overflow[i]} rows")
    return found
