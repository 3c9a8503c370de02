"""A model's paged cache as a pytree: its blocks, and one block table for all layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jax_flashmla import _checks
from jax_flashmla.cache import move, pool
from jax_flashmla.cache.check import check_table, describe
from jax_flashmla.cache.format import CacheFormat
from jax_flashmla.cache.move import CacheBlocks
from jax_flashmla.cache.pool import Blocks, LayerView
from jax_flashmla.cache.table import BlockTable, Slots
from jax_flashmla.sharding import decode_specs

if TYPE_CHECKING:
    from jax.typing import ArrayLike


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class PagedCache:
    """The paged cache of a model: its blocks, and one block table for all layers.

    Methods return a new cache; inside a jitted function that donates the old one, writes are in
    place. Outside of one they copy the blocks.

    A step of the model calls `advance` once, then in each layer `write` with the slots
    that `advance` gave, and `dense_decode` on what `layer` returns. Where all layers share one
    array, the layer's number may be traced, so that the layers can be a `lax.scan` that carries the
    cache.

    >>> import functools
    >>> import jax, jax.numpy as jnp
    >>> from jax_flashmla import BlockAllocator, BlockTable, CacheFormat, PagedCache
    >>> from jax_flashmla import dense_decode
    >>> layers, h_q = 2, 4
    >>> format = CacheFormat(d_qk=24, d_v=16, block_size=8)
    >>> allocator = BlockAllocator(num_blocks=6, block_size=8)
    >>> seqs = [allocator.allocate(20), allocator.allocate(5)]  # room for all that is to come
    >>> table = BlockTable.create(allocator.block_table(seqs, max_blocks=3), block_size=8)
    >>> cache = PagedCache.create(format, table, num_blocks=6, layers=layers)

    >>> def project(w, x):  # stands for a model's projections: [b, 24] -> query, cache row
    ...     row = jnp.tanh(x @ w)[:, None, None, :]
    ...     return jnp.repeat(row, h_q, axis=2), row
    >>> @functools.partial(jax.jit, donate_argnames="cache")
    ... def decode_step(weights, x, cache):
    ...     cache, slots = cache.advance()  # once a step
    ...     schedule = cache.table.schedule(h_q=h_q)
    ...     def layer(carry, layer_input):
    ...         x, cache = carry
    ...         i, w = layer_input
    ...         q, row = project(w, x)
    ...         cache = cache.write(row, slots, layer=i)
    ...         out, _ = dense_decode(q, *cache.layer(i), d_v=16, schedule=schedule)
    ...         x = x.at[:, :16].add(out[:, 0].mean(axis=1))
    ...         return (x, cache), None
    ...     layer_inputs = (jnp.arange(layers), weights)
    ...     (x, cache), _ = jax.lax.scan(layer, (x, cache), layer_inputs)
    ...     return x, cache

    >>> weights = jnp.ones((layers, 24, 24), jnp.bfloat16)
    >>> x = jnp.ones((2, 24), jnp.bfloat16)
    >>> for _ in range(10):
    ...     x, cache = decode_step(weights, x, cache)
    >>> cache.table.cache_seqlens  # sequence 1 has one block of 8 tokens
    Array([10,  8], dtype=int32)
    >>> cache.overflow
    Array([0, 2], dtype=int32)

    Args:
        blocks: the blocks of all layers end to end [layers * num_blocks, block_size, h_kv, d_qk];
            or a tuple with an array [num_blocks, block_size, h_kv, d_qk] for each layer.
        table: the block table.
        overflow: rows of each sequence that were dropped because its blocks were full, [b] int32.
        format: how rows are stored. Static.
        layers: how many layers. Static.
        index_blocks: the blocks of the index pool, as `blocks`; None without one.
        index_format: how its rows are stored. Static.
        index_layers: how many layers have one. Static.
    """

    # Layers are not an axis of their own: reshaping it away inside a loop, as the operations would
    # need, makes XLA copy the whole cache on each round.

    blocks: Blocks
    table: BlockTable
    overflow: jax.Array
    format: CacheFormat = dataclasses.field(metadata={"static": True})
    layers: int = dataclasses.field(metadata={"static": True})
    index_blocks: Blocks | None = None
    index_format: CacheFormat | None = dataclasses.field(default=None, metadata={"static": True})
    index_layers: int = dataclasses.field(default=0, metadata={"static": True})

    @classmethod
    def create(
        cls,
        format: CacheFormat,
        table: BlockTable,
        *,
        num_blocks: int,
        layers: int = 1,
        array_per_layer: bool = False,
        index_format: CacheFormat | None = None,
        index_layers: int | None = None,
        device: Any = None,
    ) -> PagedCache:
        """An empty cache.

        Args:
            format: how rows are stored.
            table: the block table, with the format's block_size. It is copied, so that donating
                the cache leaves it alone.
            num_blocks: blocks of each layer.
            layers: how many layers.
            array_per_layer: False for one array with the blocks of all layers; True for a tuple of
                one array for each.
            index_format: makes a second pool over the same table, for an indexer's keys; None for
                none.
            index_layers: how many layers have one; `layers` by default.
            device: a `jax.Device` or `jax.sharding.Sharding` for each array of blocks.

        Raises:
            ValueError, TypeError: an argument is not as described, or table's block_size is not
                format's.
        """
        blocks, layers, index_blocks, index_layers = pool.allocate_both(
            format, table, num_blocks, layers, index_format, index_layers,
            array_per_layer=array_per_layer, device=device,
        )  # fmt: skip
        return cls(
            blocks,
            jax.tree.map(jnp.array, table),
            jnp.zeros(table.cache_seqlens.shape, jnp.int32),
            format,
            layers,
            index_blocks,
            index_format,
            index_layers,
        )

    @property
    def num_blocks(self) -> int:
        """Blocks of each layer."""
        return pool.num_blocks(self.blocks, self.layers)

    def with_table(
        self, block_table: ArrayLike, cache_seqlens: ArrayLike | None = None
    ) -> PagedCache:
        """The same blocks under a new block table [b, max_blocks].

        Without `cache_seqlens`, the batch stays and has been given more blocks: lengths and
        overflow stay too. With it [b], it is a new batch, and `overflow` starts at 0.

        Raises:
            ValueError, TypeError: a rank, shape or dtype that does not fit.
        """
        overflow = self.overflow
        if cache_seqlens is None:
            cache_seqlens = self.table.cache_seqlens
        else:
            cache_seqlens = _checks.as_cache_seqlens(cache_seqlens)
            overflow = jnp.zeros(cache_seqlens.shape, jnp.int32)
        table = BlockTable.create(block_table, cache_seqlens, block_size=self.table.block_size)
        return dataclasses.replace(self, table=table, overflow=overflow)

    def advance(
        self, s_new: int = 1, num_new: ArrayLike | None = None, *, context_axis: str | None = None
    ) -> tuple[PagedCache, Slots]:
        """Makes room for a step's new tokens: once a step, before the layers write them.

        Lengths grow by the tokens that fit into the blocks that a sequence has; `overflow` grows by
        those that do not.

        Args:
            s_new: new tokens of each sequence, as many as the rows that `write` will bring.
            num_new: how many of them each sequence has [b], int32, clamped to [0, s_new]; s_new by
                default. 0 leaves a sequence as it is.
            context_axis: as for `BlockTable.advance`; `write` then stores this device's tokens.

        Returns:
            The cache with its new lengths, and the slots for `write`.
        """
        table, slots, dropped = self.table.advance(
            self.num_blocks, s_new, num_new, context_axis=context_axis
        )
        return dataclasses.replace(self, table=table, overflow=self.overflow + dropped), slots

    def write(
        self,
        rows: jax.Array,
        slots: Slots,
        *,
        layer: int | jax.Array | None = None,
        kv_scale: ArrayLike | None = None,
        implementation: str | None = None,
    ) -> PagedCache:
        """Writes one layer's rows to the slots that `advance` gave.

        Args:
            rows: the new rows [b, s_new, h_kv, d_qk].
            slots: this step's slots.
            layer: which layer; may be left out if there is one. May be traced unless `blocks` is a
                tuple.
            kv_scale, implementation: as for `cache_append`.

        Raises:
            ValueError, TypeError: rows that do not fit the slots or the format, or a bad layer.
        """
        blocks = pool.write(
            self.blocks, self.format, self.layers, self.table, rows, slots, layer,
            kv_scale=kv_scale, implementation=implementation,
        )  # fmt: skip
        return dataclasses.replace(self, blocks=blocks)

    def append(
        self,
        rows: jax.Array,
        *,
        num_new: ArrayLike | None = None,
        context_axis: str | None = None,
        kv_scale: ArrayLike | None = None,
        implementation: str | None = None,
    ) -> PagedCache:
        """Advances and writes the rows of all layers: a whole step at once, such as a prefill's.

        Args:
            rows: the new rows [layers, b, s_new, h_kv, d_qk]; for one layer, also without `layers`.
            num_new, context_axis: as for `advance`.
            kv_scale, implementation: as for `cache_append`.

        Raises:
            ValueError, TypeError: rows that do not fit the cache.
        """
        rows = pool.as_rows_of_layers(rows, self.layers)
        cache, slots = self.advance(rows.shape[2], num_new, context_axis=context_axis)

        def write(i: int | jax.Array, cache: PagedCache) -> PagedCache:
            return cache.write(
                rows[i], slots, layer=i, kv_scale=kv_scale, implementation=implementation
            )

        if isinstance(self.blocks, tuple):
            for i in range(self.layers):
                cache = write(i, cache)
            return cache
        return jax.lax.fori_loop(0, self.layers, write, cache)

    def layer(self, layer: int | jax.Array | None = None) -> LayerView:
        """A layer as `dense_decode` takes it: `dense_decode(q, *cache.layer(i), d_v=format.d_v)`.

        Args:
            layer: as for `write`.

        Returns:
            blocks, block_table, cache_seqlens to unpack. Where all layers share an array, `blocks`
            is that array, and `block_table` has the ids of this layer's blocks in it. The view also
            carries `format`, `first_block` (the layer's first in the array) and `num_blocks`.

        Raises:
            ValueError, TypeError: a layer that the cache does not have, or a traced one in a tuple.
        """
        return pool.view(self.blocks, self.format, self.layers, self.table, layer)

    def write_index(
        self,
        keys: jax.Array,
        slots: Slots,
        *,
        layer: int | jax.Array | None = None,
        implementation: str | None = None,
    ) -> PagedCache:
        """Writes one layer's index keys [b, s_new, 1, d] to the slots that `advance` gave.

        Raises:
            ValueError, TypeError: as for `write`; or the cache has no index pool.
        """
        blocks = pool.write(
            self._index(), self.index_format, self.index_layers, self.table, keys, slots, layer,
            implementation=implementation,
        )  # fmt: skip
        return dataclasses.replace(self, index_blocks=blocks)

    def index_layer(self, layer: int | jax.Array | None = None) -> LayerView:
        """A layer of the index pool, as `layer` gives one of the cache.

        Raises:
            ValueError, TypeError: as for `layer`; or the cache has no index pool.
        """
        return pool.view(self._index(), self.index_format, self.index_layers, self.table, layer)

    def _index(self) -> Blocks:
        if self.index_blocks is None:
            raise ValueError(
                "the cache must have an index pool, got one made without: PagedCache.create(..., "
                "index_format=, index_layers=)"
            )
        return self.index_blocks

    def copy_blocks(self, src: ArrayLike, dst: ArrayLike) -> PagedCache:
        """Copies blocks in all layers of both pools, as a fork asks for. Donates the blocks.

        Args:
            src, dst: ids of the blocks to read, and to overwrite [n], int32.

        Raises:
            ValueError, TypeError: a rank, shape or dtype that does not fit.
        """
        src = _checks.as_int32("src", src, "[n]", may_be_empty=True)
        dst = _checks.as_int32("dst", dst, "[n]", may_be_empty=True)
        blocks = pool.copy(self.blocks, self.layers, src, dst)
        index = self.index_blocks
        if index is not None:
            index = pool.copy(index, self.index_layers, src, dst)
        return dataclasses.replace(self, blocks=blocks, index_blocks=index)

    def get_sequence(self, block_ids: ArrayLike, *, shard: tuple[int, int] = (0, 1)) -> CacheBlocks:
        """A copy of blocks of all layers and both pools, to be moved. Not under jit.

        Args:
            block_ids: a sequence's blocks [n], int32; -1 gives zeros, to keep a shape.
            shard: where sequences split the cache, the share that ids count in: (rank, size).

        Raises:
            ValueError, TypeError: a rank, shape or dtype that does not fit.
        """
        return move.get_all(self, block_ids, shard)

    def insert_sequences(
        self,
        sequences: Sequence[CacheBlocks],
        block_ids: Sequence[ArrayLike],
        *,
        shard: tuple[int, int] = (0, 1),
    ) -> PagedCache:
        """The cache with blocks that `get_sequence` gave. Donates its blocks. Not under jit.

        Args:
            sequences: on the host, or on any devices, of a cache with the same formats and layers.
            block_ids: for each, the blocks to overwrite [n], int32; -1 drops one.
            shard: as for `get_sequence`.

        Raises:
            ValueError, TypeError: blocks of another cache's kind, or ids that do not fit them.
        """
        return move.insert_all(self, sequences, block_ids, shard)

    def specs(
        self,
        *,
        batch: str | None = None,
        heads: str | None = None,
        shard_kv_heads: bool = False,
        context: str | None = None,
    ) -> PagedCache:
        """The cache's PartitionSpecs for `jax.shard_map` and `jax.device_put`, as a PagedCache.

        Args:
            batch: mesh axis that splits sequences and their blocks, or None. Ids count by device.
            heads: mesh axis that splits query heads, or None.
            shard_kv_heads: whether `heads` splits the cache's heads too (`dense` formats).
            context: mesh axis that shares out each sequence's tokens, or None.
        """
        dense = decode_specs(
            batch=batch, heads=heads, shard_kv_heads=shard_kv_heads, context=context
        ).blocks

        def spec(blocks: jax.Array) -> PartitionSpec:
            return dense if blocks.ndim == 4 else PartitionSpec(dense[0], None)

        return dataclasses.replace(
            self,
            blocks=jax.tree.map(spec, self.blocks),
            table=self.table.specs(batch=batch, context=context),
            overflow=PartitionSpec(batch),  # type: ignore[arg-type]
            index_blocks=jax.tree.map(spec, self.index_blocks),
        )

    def __repr__(self) -> str:
        return describe(self)

    def check(self) -> list[str]:
        """What is wrong with the values, a sentence each: a debugging aid that reads the device.

        Lists lengths outside the table, block ids out of range within a length, blocks that two
        sequences would write next (a fork that was not extended), and rows dropped so far. Empty if
        all is well. Not under jit. A cache split over devices is checked device by device.
        """
        return check_table(self.table, self.overflow, self.num_blocks)
