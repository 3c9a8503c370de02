"""A model's paged cache as pytrees: who owns which block, and the blocks."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_flashmla import _checks, _limits
from jax_flashmla.cache_format import CacheFormat
from jax_flashmla.cache_ops import cache_append, copy_blocks

if TYPE_CHECKING:
    from jax.typing import ArrayLike


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockTable:
    """Which blocks hold each sequence's tokens, and how many tokens there are. One for all layers.

    Args:
        block_table: block ids [b, max_blocks], int32. Token t of sequence i is in block
            `block_table[i, t // block_size]`. Entries past a sequence's blocks are -1, or any other
            id that the cache does not have.
        cache_seqlens: tokens of each sequence that are in the cache [b], int32.
        block_size: tokens of a block. Static.
    """

    block_table: jax.Array
    cache_seqlens: jax.Array
    block_size: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def create(
        cls, block_table: ArrayLike, cache_seqlens: ArrayLike | None = None, *, block_size: int = 64
    ) -> BlockTable:
        """A table from arrays, which are copied. Lengths are 0 by default.

        Raises:
            ValueError, TypeError: a rank, shape or dtype that does not fit.
        """
        block_table = jnp.array(block_table)
        if cache_seqlens is None:
            cache_seqlens = jnp.zeros(block_table.shape[:1], jnp.int32)
        cache_seqlens = jnp.array(cache_seqlens)
        block_size = _checks.check_int("block_size", block_size, 1, _limits.INT32_MAX)
        b = _checks.check_cache_seqlens(cache_seqlens)
        _checks.check_block_table(block_table, b, block_size)
        return cls(block_table, cache_seqlens, block_size)

    @property
    def max_blocks(self) -> int:
        return self.block_table.shape[1]

    @property
    def max_seqlen(self) -> int:
        """Tokens that a sequence can have at most, for `make_schedule`: the width of its row."""
        return self.max_blocks * self.block_size

    def capacity(self, num_blocks: int) -> jax.Array:
        """Tokens that each sequence's blocks can hold [b]: those of its leading valid ids."""
        ends = (self.block_table < 0) | (self.block_table >= num_blocks)
        owned = jnp.where(ends.any(axis=1), jnp.argmax(ends, axis=1), self.max_blocks)
        return owned.astype(jnp.int32) * self.block_size


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """Where a step's new tokens go, the same in every layer. Made by `PagedCache.advance`.

    Args:
        positions: token position of each sequence's first new token [b], int32; also what rotary
            embeddings of the new tokens start from.
        num_new: tokens to write [b], int32: those asked for that fit.
        s_new: rows that a call of `PagedCache.write` brings for each sequence. Static.
    """

    positions: jax.Array
    num_new: jax.Array
    s_new: int = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
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
    >>> from jax_flashmla import dense_decode, make_schedule
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
    ...     schedule = make_schedule(
    ...         cache.table.cache_seqlens, h_q=h_q, max_seqlen=cache.table.max_seqlen
    ...     )
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
    """

    # Layers are not an axis of their own: reshaping it away inside a loop, as the operations would
    # need, makes XLA copy the whole cache on each round.

    blocks: jax.Array | tuple[jax.Array, ...]
    table: BlockTable
    overflow: jax.Array
    format: CacheFormat = dataclasses.field(metadata={"static": True})
    layers: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def create(
        cls,
        format: CacheFormat,
        table: BlockTable,
        *,
        num_blocks: int,
        layers: int = 1,
        array_per_layer: bool = False,
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
            device: a `jax.Device` or `jax.sharding.Sharding` for each array of blocks.

        Raises:
            ValueError, TypeError: the table's block_size is not the format's, or a bad count.
        """
        if table.block_size != format.block_size:
            raise ValueError(
                f"table must have the format's block_size = {format.block_size}, got "
                f"{table.block_size}"
            )
        layers = _checks.check_int("layers", layers, 1, _limits.INT32_MAX)
        blocks: jax.Array | tuple[jax.Array, ...]
        if array_per_layer:
            blocks = tuple(format.allocate(num_blocks, device=device) for _ in range(layers))
        else:
            num_blocks = _checks.check_int("num_blocks", num_blocks, 1, _limits.INT32_MAX // layers)
            blocks = format.allocate(layers * num_blocks, device=device)
        overflow = jnp.zeros(table.cache_seqlens.shape, jnp.int32)
        return cls(blocks, jax.tree.map(jnp.array, table), overflow, format, layers)

    @property
    def num_blocks(self) -> int:
        """Blocks of each layer."""
        if isinstance(self.blocks, tuple):
            return self.blocks[0].shape[0]
        return self.blocks.shape[0] // self.layers

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
            overflow = jnp.zeros(jnp.shape(cache_seqlens), jnp.int32)
        table = BlockTable.create(block_table, cache_seqlens, block_size=self.table.block_size)
        return dataclasses.replace(self, table=table, overflow=overflow)

    def advance(self, s_new: int = 1, num_new: ArrayLike | None = None) -> tuple[PagedCache, Slots]:
        """Makes room for a step's new tokens: once a step, before the layers write them.

        Lengths grow by the tokens that fit into the blocks that a sequence has; `overflow` grows by
        those that do not.

        Args:
            s_new: new tokens of each sequence, as many as the rows that `write` will bring.
            num_new: how many of them each sequence has [b], int32, clamped to [0, s_new]; s_new by
                default. 0 leaves a sequence as it is.

        Returns:
            The cache with its new lengths, and the slots for `write`.
        """
        s_new = _checks.check_int("s_new", s_new, 1, _limits.INT32_MAX)
        seqlens = self.table.cache_seqlens
        if num_new is None:
            num_new = jnp.full(seqlens.shape, s_new, jnp.int32)
        else:
            num_new = jnp.asarray(num_new)
            _checks.check_per_sequence("num_new", num_new, seqlens.shape[0])
            num_new = jnp.clip(num_new, 0, s_new)
        capacity = self.table.capacity(self.num_blocks)
        positions = jnp.clip(seqlens, 0, capacity)
        fitting = jnp.minimum(num_new, capacity - positions)
        cache = dataclasses.replace(
            self,
            table=dataclasses.replace(self.table, cache_seqlens=positions + fitting),
            overflow=self.overflow + (num_new - fitting),
        )
        return cache, Slots(positions, fitting, s_new)

    def write(
        self,
        rows: jax.Array,
        slots: Slots,
        *,
        layer: int | jax.Array | None = None,
        implementation: str | None = None,
    ) -> PagedCache:
        """Writes one layer's rows to the slots that `advance` gave.

        Args:
            rows: the new rows [b, s_new, h_kv, d_qk].
            slots: this step's slots.
            layer: which layer; may be left out if there is one. May be traced unless `blocks` is a
                tuple.
            implementation: as for `cache_append`.

        Raises:
            ValueError, TypeError: rows that do not fit the slots or the format, or a bad layer.
        """
        if len(jnp.shape(rows)) == 4 and rows.shape[1] != slots.s_new:
            raise ValueError(
                f"rows must have the s_new = {slots.s_new} of the step's advance(), got shape "
                f"{rows.shape}"
            )
        old, block_table, _ = self.layer(layer)
        new = cache_append(
            old,
            rows,
            block_table,
            slots.positions,
            num_new=slots.num_new,
            implementation=implementation,
        )
        if isinstance(self.blocks, tuple):
            layer = layer or 0
            new_blocks = (*self.blocks[:layer], new, *self.blocks[layer + 1 :])
            return dataclasses.replace(self, blocks=new_blocks)
        return dataclasses.replace(self, blocks=new)

    def append(
        self,
        rows: jax.Array,
        *,
        num_new: ArrayLike | None = None,
        implementation: str | None = None,
    ) -> PagedCache:
        """Advances and writes the rows of all layers: a whole step at once, such as a prefill's.

        Args:
            rows: the new rows [layers, b, s_new, h_kv, d_qk]; for one layer, also without `layers`.
            num_new: as for `advance`.
            implementation: as for `cache_append`.

        Raises:
            ValueError, TypeError: rows that do not fit the cache.
        """
        if self.layers == 1 and rows.ndim == 4:
            rows = rows[None]
        if rows.ndim != 5 or rows.shape[0] != self.layers:
            raise ValueError(
                f"rows must be [layers = {self.layers}, b, s_new, h_kv, d_qk], got shape "
                f"{rows.shape}"
            )
        cache, slots = self.advance(rows.shape[2], num_new)

        def write(i: int | jax.Array, cache: PagedCache) -> PagedCache:
            return cache.write(rows[i], slots, layer=i, implementation=implementation)

        if isinstance(self.blocks, tuple):
            for i in range(self.layers):
                cache = write(i, cache)
            return cache
        return jax.lax.fori_loop(0, self.layers, write, cache)

    def layer(self, layer: int | jax.Array | None = None) -> tuple[jax.Array, jax.Array, jax.Array]:
        """A layer as `dense_decode` takes it: `dense_decode(q, *cache.layer(i), d_v=format.d_v)`.

        Args:
            layer: which layer; may be left out if there is one. May be traced unless `blocks` is a
                tuple.

        Returns:
            blocks, block_table, cache_seqlens. Where all layers share an array, `blocks` is that
            array, and `block_table` has the ids of this layer's blocks in it.

        Raises:
            ValueError, TypeError: a layer that the cache does not have, or a traced one in a tuple.
        """
        if layer is None and self.layers == 1:
            layer = 0
        table, num_blocks = self.table, self.num_blocks
        if not isinstance(layer, jax.Array) or isinstance(self.blocks, tuple):
            layer = _checks.check_int("layer", layer, 0, self.layers - 1)
        if isinstance(self.blocks, tuple):
            return self.blocks[layer], table.block_table, table.cache_seqlens
        ids = _in_layer(table.block_table, layer, num_blocks)
        return self.blocks, ids, table.cache_seqlens

    def copy_blocks(self, src: ArrayLike, dst: ArrayLike) -> PagedCache:
        """Copies blocks in every layer, as a fork asks for: see `copy_blocks`. Donates the blocks.

        Args:
            src: ids of the blocks to read [n], int32.
            dst: ids of the blocks to overwrite [n], int32.

        Raises:
            ValueError, TypeError: a rank, shape or dtype that does not fit.
        """
        src, dst = jnp.asarray(src), jnp.asarray(dst)
        blocks: jax.Array | tuple[jax.Array, ...]
        if isinstance(self.blocks, tuple):
            blocks = tuple(copy_blocks(x, src, dst) for x in self.blocks)
        else:
            src, dst = (
                jnp.concatenate([_in_layer(ids, i, self.num_blocks) for i in range(self.layers)])
                for ids in (src, dst)
            )
            blocks = copy_blocks(self.blocks, src, dst)
        return dataclasses.replace(self, blocks=blocks)

    def check(self) -> list[str]:
        """What is wrong with the values, a sentence each: a debugging aid that reads the device.

        Lists lengths outside the table, block ids out of range within a length, blocks that a
        sequence's next tokens would go to while another entry of the table holds them too (a fork
        that was not extended, for one), and rows dropped so far. Empty if all is well. Not under
        jit.
        """
        ids = np.asarray(self.table.block_table)
        seqlens = np.asarray(self.table.cache_seqlens)
        size, max_blocks = self.table.block_size, self.table.max_blocks
        in_range = (ids >= 0) & (ids < self.num_blocks)
        found = []
        for i in np.flatnonzero((seqlens < 0) | (seqlens > max_blocks * size)):
            found.append(
                f"sequence {i} has {seqlens[i]} tokens, its table holds 0 to {max_blocks * size}"
            )
        covered = np.clip(-(-seqlens.astype(np.int64) // size), 0, max_blocks)
        column = np.arange(max_blocks)
        for i, j in np.argwhere(~in_range & (column < covered[:, None])):
            found.append(
                f"sequence {i} reads block {ids[i, j]} at entry {j}, the cache has blocks 0 to "
                f"{self.num_blocks - 1}"
            )
        # Appends write to entries from length // block_size on, and only read those before.
        written = in_range & (column >= np.clip(seqlens // size, 0, max_blocks)[:, None])
        holders = np.bincount(ids[in_range], minlength=self.num_blocks)
        for i, j in np.argwhere(written):
            if holders[ids[i, j]] > 1:
                others = sorted({int(k) for k in np.argwhere(ids == ids[i, j])[:, 0] if k != i})
                found.append(
                    f"sequence {i} writes block {ids[i, j]} at entry {j}, "
                    + (f"which sequences {others} hold" if others else "which it holds twice")
                )
        for i in np.flatnonzero(np.asarray(self.overflow)):
            found.append(f"sequence {i} dropped {np.asarray(self.overflow)[i]} rows")
        return found


def _in_layer(ids: jax.Array, layer: int | jax.Array, num_blocks: int) -> jax.Array:
    """A layer's block ids as ids into the array of all layers; bad ones stay out of range."""
    in_range = (ids >= 0) & (ids < num_blocks)
    return jnp.where(in_range, ids + jnp.asarray(layer, ids.dtype) * num_blocks, -1)
