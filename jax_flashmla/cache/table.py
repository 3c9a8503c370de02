"""Which blocks hold each sequence's tokens, and where a step's new tokens go."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jax_flashmla import _checks, _limits
from jax_flashmla._context import context_of
from jax_flashmla.cache.format import CacheFormat
from jax_flashmla.ops.make_schedule import SplitSchedule, make_schedule

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
        cache_seqlens: tokens of each sequence that are in the cache [b], int32; under context
            parallelism of the whole sequence, of which block_table has the device's tokens.
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
        block_size = _checks.check_int("block_size", block_size, 1, _limits.INT32_MAX)
        if cache_seqlens is None:
            ids = _checks.as_int32("block_table", block_table, "[b, max_blocks]")
            cache_seqlens = jnp.zeros(ids.shape[:1], jnp.int32)
        cache_seqlens = _checks.as_cache_seqlens(cache_seqlens)
        ids = _checks.as_block_table(block_table, cache_seqlens.shape[0], block_size)
        return cls(jnp.array(ids), jnp.array(cache_seqlens), block_size)

    @property
    def max_blocks(self) -> int:
        """Blocks that a sequence can have at most: the width of the table."""
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

    def schedule(
        self,
        *,
        h_q: int,
        h_kv: int = 1,
        s_q: int = 1,
        format: CacheFormat | None = None,
        num_parts: int | None = None,
        batch_invariant: bool = False,
        context: tuple[ArrayLike, int] | None = None,
        implementation: str | None = None,
    ) -> SplitSchedule:
        """The step's schedule: `make_schedule` of these lengths and this width."""
        return make_schedule(
            self.cache_seqlens,
            h_q=h_q,
            h_kv=h_kv,
            s_q=s_q,
            max_seqlen=self.max_seqlen,
            format=format,
            num_parts=num_parts,
            batch_invariant=batch_invariant,
            context=context,
            implementation=implementation,
        )

    def advance(
        self,
        num_blocks: int,
        s_new: int = 1,
        num_new: ArrayLike | None = None,
        *,
        context_axis: str | None = None,
    ) -> tuple[BlockTable, Slots, jax.Array]:
        """Makes room for a step's new tokens, of a pool of `num_blocks` blocks.

        Args:
            num_blocks: blocks of each layer.
            s_new: new tokens of each sequence. Static.
            num_new: how many of them each sequence has [b], clamped to [0, s_new]; s_new by
                default.
            context_axis: inside `jax.shard_map`, the mesh axis that shares out the tokens of each
                sequence: of token t its rank t mod n has room to make. One that a rank has none for
                does not fit on any.

        Returns:
            The table with its new lengths, the slots for `write`, and the tokens of each sequence
            that did not fit into its blocks [b] int32.
        """
        _checks.refuse_donated("table", self)
        s_new = _checks.check_int("s_new", s_new, 1, _limits.INT32_MAX)
        b = self.cache_seqlens.shape[0]
        if num_new is None:
            num_new = jnp.full(b, s_new, jnp.int32)
        num_new = jnp.clip(_checks.as_per_sequence("num_new", num_new, b), 0, s_new)
        capacity = self.capacity(num_blocks)
        here = None if context_axis is None else context_of(context_axis, "context_axis")
        if here is not None:
            assert context_axis is not None
            capacity = here.agree(capacity, context_axis)
        positions = jnp.clip(self.cache_seqlens, 0, capacity)
        fitting = jnp.minimum(num_new, capacity - positions)
        table = dataclasses.replace(self, cache_seqlens=positions + fitting)
        share = None
        if here is not None:
            before = here.count(positions)
            share = Share(
                (here.rank - positions) % here.size,
                before,
                here.count(positions + fitting) - before,
                here.size,
            )
        return table, Slots(positions, fitting, s_new, share), num_new - fitting

    def specs(self, *, batch: str | None = None, context: str | None = None) -> BlockTable:
        """The table's PartitionSpecs for `jax.shard_map`, as a BlockTable: `batch` splits b, and
        each device of `context` has columns of its own."""
        table, seqlens = PartitionSpec(batch, context), PartitionSpec(batch)
        return BlockTable(table, seqlens, self.block_size)  # type: ignore[arg-type]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Share:
    """Which of a step's new tokens a rank stores, under context parallelism: every size-th.

    Attributes:
        first: which of a sequence's new tokens is the rank's first [b], int32.
        positions: where it goes among the rank's own tokens of the sequence [b], int32.
        num_new: how many are the rank's [b], int32.
        size: how many ranks there are. Static.
    """

    first: jax.Array
    positions: jax.Array
    num_new: jax.Array
    size: int = dataclasses.field(metadata={"static": True})

    def take(self, rows: jax.Array) -> jax.Array:
        """Of rows [b, s_new, ...] the rank's [b, ceil(s_new / size), ...], then any."""
        s_new = rows.shape[1]
        step = jnp.arange(-(-s_new // self.size), dtype=jnp.int32) * self.size
        row = jnp.minimum(self.first[:, None] + step[None, :], s_new - 1)
        return jnp.take_along_axis(rows, row.reshape(*row.shape, *[1] * (rows.ndim - 2)), axis=1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """Where a step's new tokens go, the same in every layer. Made by `PagedCache.advance`.

    Args:
        positions: token position of each sequence's first new token [b], int32; also what rotary
            embeddings of the new tokens start from.
        num_new: tokens to write [b], int32: those asked for that fit.
        s_new: rows that a call of `PagedCache.write` brings for each sequence. Static.
        share: which of them this device stores, under context parallelism.
    """

    positions: jax.Array
    num_new: jax.Array
    s_new: int = dataclasses.field(metadata={"static": True})
    share: Share | None = None

    def specs(self, *, batch: str | None = None) -> Slots:
        """The slots' PartitionSpecs for `jax.shard_map`, as Slots: `batch` splits b."""
        per_sequence = PartitionSpec(batch)
        return Slots(per_sequence, per_sequence, self.s_new)  # type: ignore[arg-type]
