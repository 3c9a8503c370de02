"""Moving blocks out of a cache and into another: to host memory, to another mesh, to a file."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec, Sharding

from jax_flashmla import _checks
from jax_flashmla.cache.format import CacheFormat
from jax_flashmla.cache.pool import Blocks, num_blocks

if TYPE_CHECKING:
    from jax.typing import ArrayLike


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CacheBlocks:
    """Some blocks of a cache, in all layers: a pytree for `jax.device_get`, `device_put`, files.

    Attributes:
        blocks: [layers, n, *block_shape].
        index_blocks: those of the index pool [index_layers, n, *block_shape]; None without one.
        format: how rows are stored. Static.
        index_format: how index keys are. Static.
    """

    blocks: jax.Array
    index_blocks: jax.Array | None
    format: CacheFormat = dataclasses.field(metadata={"static": True})
    index_format: CacheFormat | None = dataclasses.field(metadata={"static": True})


def check_shard(shard: tuple[int, int]) -> tuple[int, int]:
    """That it is (rank, size) with 0 <= rank < size."""
    if not isinstance(shard, tuple) or len(shard) != 2:
        raise TypeError(f"shard must be a tuple (rank, size), got {shard!r}")
    size = _checks.check_int("shard[1]", shard[1], 1, 2**31 - 1)
    return _checks.check_int("shard[0]", shard[0], 0, size - 1), size


def check_ids(block_ids: ArrayLike, name: str = "block_ids") -> jax.Array:
    return _checks.as_int32(name, block_ids, "[n]", may_be_empty=True)


def get(blocks: Blocks, layers: int, ids: jax.Array, shard: tuple[int, int]) -> jax.Array:
    """Blocks `ids` [n] of every layer [layers, n, *block_shape]; zeros for ids that are not."""
    if isinstance(blocks, tuple):
        return jnp.concatenate([get(x, 1, ids, shard) for x in blocks])
    index = _index(blocks, layers, ids, shard)
    sharding = _moved_sharding(blocks)
    return _gather(sharding)(blocks, _beside(index, sharding))


def insert(
    blocks: Blocks, layers: int, moved: Any, ids: jax.Array, shard: tuple[int, int]
) -> Blocks:
    """The blocks with `moved` [layers, n, *block_shape] as `ids` [n]. Donates them."""
    if isinstance(blocks, tuple):
        return tuple(_insert(x, 1, moved[i : i + 1], ids, shard) for i, x in enumerate(blocks))
    return _insert(blocks, layers, moved, ids, shard)


def _insert(
    blocks: jax.Array, layers: int, moved: Any, ids: jax.Array, shard: tuple[int, int]
) -> jax.Array:
    index = _index(blocks, layers, ids, shard)
    sharding = _moved_sharding(blocks)
    moved = jax.device_put(moved, sharding)
    return _scatter(blocks.sharding)(blocks, _beside(index, sharding), moved)


def get_all(cache: Any, block_ids: ArrayLike, shard: tuple[int, int]) -> CacheBlocks:
    """`PagedCache.get_sequence`."""
    _check_movable("get_sequence", cache)
    ids, shard = check_ids(block_ids), check_shard(shard)
    index = cache.index_blocks
    return CacheBlocks(
        get(cache.blocks, cache.layers, ids, shard),
        None if index is None else get(index, cache.index_layers, ids, shard),
        cache.format,
        cache.index_format,
    )


def insert_all(cache: Any, sequences: Any, block_ids: Any, shard: tuple[int, int]) -> Any:
    """`PagedCache.insert_sequences`: nothing is written before all has been checked."""
    _check_movable("insert_sequences", cache)
    shard = check_shard(shard)
    if isinstance(sequences, CacheBlocks):
        raise TypeError("sequences must be a list of CacheBlocks, got one alone")
    ids = [check_ids(x, f"block_ids[{i}]") for i, x in enumerate(block_ids)]
    if len(sequences) != len(ids):
        raise ValueError(
            f"block_ids must be as many as sequences, {len(sequences)}, got {len(ids)}"
        )
    has_index = cache.index_blocks is not None
    for i, (moved, to) in enumerate(zip(sequences, ids, strict=True)):
        if not isinstance(moved, CacheBlocks):
            raise TypeError(f"sequences[{i}] must be CacheBlocks, got {_checks.describe(moved)}")
        formats = moved.format, moved.index_format
        if formats != (cache.format, cache.index_format):
            raise ValueError(
                f"sequences[{i}] must have the cache's formats {cache.format}, "
                f"{cache.index_format}, got {moved.format}, {moved.index_format}"
            )
        name = f"sequences[{i}].blocks"
        _check_moved(name, moved.blocks, cache.blocks, cache.layers, len(to))
        if has_index:
            name = f"sequences[{i}].index_blocks"
            _check_moved(name, moved.index_blocks, cache.index_blocks, cache.index_layers, len(to))
    blocks, index = cache.blocks, cache.index_blocks
    for moved, to in zip(sequences, ids, strict=True):
        blocks = insert(blocks, cache.layers, moved.blocks, to, shard)
        if has_index:
            index = insert(index, cache.index_layers, moved.index_blocks, to, shard)
    return dataclasses.replace(cache, blocks=blocks, index_blocks=index)


def _check_movable(method: str, cache: Any) -> None:
    """That its arrays are there, with shardings of their own."""
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(cache)):
        raise TypeError(f"{method} cannot be called under jit or shard_map, got a traced cache")
    _checks.refuse_donated("cache", cache)


def _check_moved(name: str, moved: Any, like: Blocks, layers: int, n: int) -> None:
    """That these are n blocks of so many layers, stored as in `like`."""
    one = like[0] if isinstance(like, tuple) else like
    expected = (layers, n, *one.shape[1:])
    if moved.shape != expected or moved.dtype != one.dtype:
        raise ValueError(
            f"{name} must be {one.dtype}{list(expected)}, got {moved.dtype}{list(moved.shape)}"
        )


def _index(blocks: jax.Array, layers: int, ids: jax.Array, shard: tuple[int, int]) -> jax.Array:
    """Places in the array [layers, n]; its size for ids out of range: gathers fill, sets drop.

    A cache that is split by sequences is one after the other's [layers * num_blocks] blocks.
    """
    rank, size = shard
    if blocks.shape[0] % (size * layers):
        raise ValueError(
            f"shard[1] must divide the {num_blocks(blocks, layers)} blocks of a layer, got {size}"
        )
    count = blocks.shape[0] // (size * layers)
    first = (rank * layers + jnp.arange(layers, dtype=jnp.int32)) * count
    in_range = (ids >= 0) & (ids < count)
    return jnp.where(in_range[None], first[:, None] + ids[None], blocks.shape[0])


def _moved_sharding(blocks: jax.Array) -> Sharding:
    """Of what is moved: split as a block is, and whole along layers and blocks."""
    sharding = blocks.sharding
    if not isinstance(sharding, NamedSharding):
        return sharding
    spec = PartitionSpec(None, None, *sharding.spec[1:])
    return NamedSharding(sharding.mesh, spec)


def _beside(index: jax.Array, sharding: Sharding) -> jax.Array:
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, PartitionSpec())
    return jax.device_put(index, sharding)


def _explicit(sharding: Sharding) -> NamedSharding | None:
    """The sharding where types carry it: there operations have to be told, elsewhere must not."""
    if isinstance(sharding, NamedSharding) and AxisType.Explicit in sharding.mesh.axis_types:
        return sharding
    return None


@functools.cache
def _gather(sharding: Sharding) -> Any:
    def gather(blocks: jax.Array, index: jax.Array) -> jax.Array:
        return blocks.at[index].get(mode="fill", fill_value=0, out_sharding=_explicit(sharding))

    return jax.jit(gather, out_shardings=sharding)


@functools.cache
def _scatter(sharding: Sharding) -> Any:
    def scatter(blocks: jax.Array, index: jax.Array, moved: jax.Array) -> jax.Array:
        return blocks.at[index].set(moved, mode="drop", out_sharding=_explicit(sharding))

    return jax.jit(scatter, out_shardings=sharding, donate_argnums=0)
