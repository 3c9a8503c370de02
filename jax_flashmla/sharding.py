"""How decoding is laid out over devices: the specs of `jax.shard_map`."""

from __future__ import annotations

from typing import NamedTuple

from jax.sharding import PartitionSpec

from jax_flashmla._checks import check_bool


class DecodeSpecs(NamedTuple):
    """PartitionSpecs of dense_decode's arrays."""

    q: PartitionSpec
    blocks: PartitionSpec
    block_table: PartitionSpec
    cache_seqlens: PartitionSpec
    out: PartitionSpec
    lse: PartitionSpec

    @property
    def in_specs(self) -> tuple[PartitionSpec, ...]:
        """In the order of dense_decode's positional arguments."""
        return self.q, self.blocks, self.block_table, self.cache_seqlens

    @property
    def out_specs(self) -> tuple[PartitionSpec, PartitionSpec]:
        return self.out, self.lse


def decode_specs(
    *,
    batch: str | None = None,
    heads: str | None = None,
    shard_kv_heads: bool = False,
    context: str | None = None,
) -> DecodeSpecs:
    """The specs for `dense_decode` under `jax.shard_map`. Without context nothing is communicated.

    Decoding goes through shard_map because a custom call that XLA partitions by itself first
    gathers the cache on every device.

    - `heads`: h_q is split over this mesh axis. The cache, one latent row per token, is the same
      on each of its devices; with shard_kv_heads its h_kv is split along with h_q instead.
    - `batch`: b, and with it the cache's num_blocks, is split over this mesh axis: a sequence's
      blocks are on the device that has the sequence, and block ids count from that device's first.
    - `context`: the tokens of each sequence, and with them num_blocks, are shared out over this
      mesh axis, for `jax_flashmla.context.dense_decode`. Each device has a table of its own:
      block_table's columns are split. It may be the axis of heads too, which q is gathered over.

        specs = decode_specs(batch="data", heads="model")
        decode = jax.shard_map(
            dense_decode, mesh=mesh, in_specs=specs.in_specs, out_specs=specs.out_specs
        )

    Make a schedule inside the mapped function too: it is of the device's own sequences and heads.

    Args:
        batch: mesh axis that splits sequences, or None.
        heads: mesh axis that splits query heads, or None.
        shard_kv_heads: whether `heads` splits the cache's heads as well.
        context: mesh axis that shares out each sequence's tokens, or None.

    Raises:
        TypeError: shard_kv_heads is no bool.
        ValueError: shard_kv_heads without heads, or one axis named for what it cannot split twice.
    """
    check_bool("shard_kv_heads", shard_kv_heads)
    if shard_kv_heads and heads is None:
        raise ValueError("heads must name a mesh axis where shard_kv_heads is True, got None")
    if batch is not None and batch == heads:
        raise ValueError(f"batch and heads must be different mesh axes, got {batch!r} for both")
    if context is not None and (batch == context or (shard_kv_heads and heads == context)):
        raise ValueError(
            "context must be another mesh axis than batch, and than heads where the cache's heads "
            f"are split, got {context!r}"
        )
    blocks = tuple(axis for axis in (batch, context) if axis is not None)
    return DecodeSpecs(
        q=PartitionSpec(batch, None, heads, None),
        blocks=PartitionSpec(blocks or None, None, heads if shard_kv_heads else None, None),
        block_table=PartitionSpec(batch, context),
        cache_seqlens=PartitionSpec(batch),
        out=PartitionSpec(batch, None, heads, None),
        lse=PartitionSpec(batch, None, heads),
    )
