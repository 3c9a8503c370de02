"""A pool: the blocks of some layers, all in one array or in one for each, under a block table."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from jax_flashmla import _checks, _limits
from jax_flashmla.cache.copy import copy_blocks
from jax_flashmla.cache.format import CacheFormat
from jax_flashmla.cache.table import BlockTable, Share, Slots
from jax_flashmla.ops.cache_append import cache_append

if TYPE_CHECKING:
    from jax.typing import ArrayLike

# [layers * num_blocks, *block_shape], or for each layer [num_blocks, *block_shape].
Blocks = jax.Array | tuple[jax.Array, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerView:
    """One layer of a pool. Unpacks as blocks, block_table, cache_seqlens.

    Attributes:
        blocks: the array that has the layer's blocks [at least num_blocks, *block_shape].
        block_table: ids [b, max_blocks] of the layer's blocks in that array, int32.
        cache_seqlens: tokens of each sequence [b], int32.
        first_block: the layer's first block in the array, an int or [] int32.
        num_blocks: blocks of the layer. Static.
        format: how rows are stored. Static.
    """

    blocks: jax.Array
    block_table: jax.Array
    cache_seqlens: jax.Array
    first_block: int | jax.Array
    num_blocks: int = dataclasses.field(metadata={"static": True})
    format: CacheFormat = dataclasses.field(metadata={"static": True})

    def __iter__(self) -> Iterator[jax.Array]:
        return iter((self.blocks, self.block_table, self.cache_seqlens))

    def __len__(self) -> int:
        return 3

    def __getitem__(self, i: int) -> jax.Array:
        return tuple(self)[i]


def allocate(
    format: CacheFormat, num_blocks: int, layers: int, *, array_per_layer: bool, device: Any
) -> Blocks:
    """Zeroed blocks of all layers."""
    _checks.check_bool("array_per_layer", array_per_layer)
    if array_per_layer:
        return tuple(format.allocate(num_blocks, device=device) for _ in range(layers))
    num_blocks = _checks.check_int("num_blocks", num_blocks, 1, _limits.INT32_MAX // layers)
    return format.allocate(layers * num_blocks, device=device)


def allocate_both(
    format: CacheFormat,
    table: BlockTable,
    num_blocks: int,
    layers: int,
    index_format: CacheFormat | None,
    index_layers: int | None,
    **options: Any,
) -> tuple[Blocks, int, Blocks | None, int]:
    """A cache's blocks and layers, and those of its index pool: None and 0 without one."""
    layers = _checks.check_int("layers", layers, 1, _limits.INT32_MAX)
    if not isinstance(table, BlockTable):
        raise TypeError(f"table must be a BlockTable, got {_checks.describe(table)}")
    for name, of in (("format", format), ("index_format", index_format)):
        if of is None and name == "index_format":
            continue
        if not isinstance(of, CacheFormat):
            raise TypeError(f"{name} must be a CacheFormat, got {_checks.describe(of)}")
        if table.block_size != of.block_size:
            raise ValueError(
                f"table must have {name}'s block_size = {of.block_size}, got {table.block_size}"
            )
    blocks = allocate(format, num_blocks, layers, **options)
    if index_format is None:
        if index_layers is not None:
            raise ValueError(
                f"index_layers must be None without index_format, got {index_layers!r}"
            )
        return blocks, layers, None, 0
    index_layers = layers if index_layers is None else index_layers
    index_layers = _checks.check_int("index_layers", index_layers, 1, _limits.INT32_MAX)
    return blocks, layers, allocate(index_format, num_blocks, index_layers, **options), index_layers


def num_blocks(blocks: Blocks, layers: int) -> int:
    """Blocks of each layer."""
    return blocks[0].shape[0] if isinstance(blocks, tuple) else blocks.shape[0] // layers


def _layer_number(blocks: Blocks, layers: int, layer: int | jax.Array | None) -> int | jax.Array:
    if layer is None:
        if layers != 1:
            raise ValueError(f"layer must be given: the cache has {layers} layers, got None")
        return 0
    return _checks.as_layer(layer, layers, may_be_traced=not isinstance(blocks, tuple))


def view(
    blocks: Blocks,
    format: CacheFormat | None,
    layers: int,
    table: BlockTable,
    layer: int | jax.Array | None,
) -> LayerView:
    """A layer; None is the only one there is."""
    assert format is not None
    layer, count = _layer_number(blocks, layers, layer), num_blocks(blocks, layers)
    if isinstance(blocks, tuple):
        assert isinstance(layer, int)
        ids, first = table.block_table, 0
        return LayerView(blocks[layer], ids, table.cache_seqlens, first, count, format)
    first_block = layer * count
    ids = _in_layer(table.block_table, first_block, count)
    return LayerView(blocks, ids, table.cache_seqlens, first_block, count, format)


def write(
    blocks: Blocks,
    format: CacheFormat | None,
    layers: int,
    table: BlockTable,
    rows: jax.Array,
    slots: Slots,
    layer: int | jax.Array | None,
    *,
    kv_scale: ArrayLike | None = None,
    implementation: str | None = None,
) -> Blocks:
    """The blocks with a layer's rows [b, s_new, h_kv, d_qk] in the slots."""
    if not isinstance(slots, Slots):
        raise TypeError(
            f"slots must be the Slots of the step's advance(), got {_checks.describe(slots)}"
        )
    _checks.refuse_foreign("rows", rows, "[b, s_new, h_kv, d_qk]")
    if len(rows.shape) == 4 and rows.shape[1] != slots.s_new:
        raise ValueError(
            f"rows must have the s_new = {slots.s_new} of the step's advance(), got shape "
            f"{rows.shape}"
        )
    of = view(blocks, format, layers, table, layer)
    new_tokens: Slots | Share = slots
    if slots.share is not None:
        new_tokens, rows = slots.share, slots.share.take(jnp.asarray(rows))
    new = cache_append(
        of.blocks,
        rows,
        of.block_table,
        new_tokens.positions,
        num_new=new_tokens.num_new,
        format=of.format,
        kv_scale=kv_scale,
        implementation=implementation,
    )
    if isinstance(blocks, tuple):
        i = _layer_number(blocks, layers, layer)
        assert isinstance(i, int)
        return (*blocks[:i], new, *blocks[i + 1 :])
    return new


def as_rows_of_layers(rows: Any, layers: int) -> jax.Array:
    """[layers, b, s_new, h_kv, d_qk]; those of one layer may come without `layers`."""
    dims = "[layers, b, s_new, h_kv, d_qk]"
    _checks.refuse_foreign("rows", rows, dims)
    shape = rows.shape
    if layers == 1 and len(shape) == 4:
        rows, shape = rows[None], (1, *shape)
    if len(shape) != 5 or shape[0] != layers:
        raise ValueError(
            f"rows must be [layers = {layers}, b, s_new, h_kv, d_qk], got shape {shape}"
        )
    _checks.check_array("rows", rows, dims, _checks.CACHE_DTYPES)
    return jnp.asarray(rows)


def copy(blocks: Blocks, layers: int, src: jax.Array, dst: jax.Array) -> Blocks:
    """The blocks with `src` [n] copied over `dst` [n] in every layer. Donates them."""
    if isinstance(blocks, tuple):
        return tuple(copy_blocks(x, src, dst) for x in blocks)
    count = num_blocks(blocks, layers)
    src, dst = (
        jnp.concatenate([_in_layer(ids, i * count, count) for i in range(layers)])
        for ids in (src, dst)
    )
    return copy_blocks(blocks, src, dst)


def _in_layer(ids: jax.Array, first_block: int | jax.Array, num_blocks: int) -> jax.Array:
    """A layer's block ids as ids into the array of all layers; bad ones stay out of range."""
    in_range = (ids >= 0) & (ids < num_blocks)
    return jnp.where(in_range, ids + jnp.asarray(first_block, ids.dtype), -1)
