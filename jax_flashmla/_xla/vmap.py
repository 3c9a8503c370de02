"""vmap of operations: the mapped axis, of size n, is folded into b."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from jax_flashmla import _limits

Dims = tuple[int | None, ...]


def mapped_size(operands: tuple[jax.Array, ...], dims: Dims) -> int:
    return next(x.shape[d] for x, d in zip(operands, dims, strict=True) if d is not None)


def shape_of_one(x: jax.Array, dim: int | None) -> tuple[int, ...]:
    """Without the mapped axis, wherever that is."""
    return x.shape if dim is None else (*x.shape[:dim], *x.shape[dim + 1 :])


def fold(x: jax.Array, dim: int | None, n: int) -> jax.Array:
    """[b, ...] per mapped index as [n * b, ...]."""
    x = jnp.broadcast_to(x, (n, *x.shape)) if dim is None else jnp.moveaxis(x, dim, 0)
    return x.reshape(n * x.shape[1], *x.shape[2:])


def unfold(x: jax.Array, n: int) -> jax.Array:
    return x.reshape(n, x.shape[0] // n, *x.shape[1:])


def fold_blocks(
    blocks: jax.Array,
    dim: int | None,
    block_table: jax.Array,
    n: int,
    block_shape: tuple[int, ...],
) -> tuple[jax.Array, jax.Array]:
    """n caches as one, and the table [n * b, max_blocks] with ids into it.

    An id that was out of range stays so: it must not reach into another cache.
    """
    num_blocks = blocks.size // (1 if dim is None else n) // math.prod(block_shape)
    if n * num_blocks > _limits.INT32_MAX:
        raise ValueError(
            "blocks under vmap must hold at most 2^31 - 1 blocks over the mapped axis, got "
            f"{n} times {num_blocks}"
        )
    first = jnp.arange(n, dtype=jnp.int32) * num_blocks
    in_range = (block_table >= 0) & (block_table < num_blocks)
    ids = block_table + jnp.repeat(first, block_table.shape[0] // n)[:, None]
    return fold(blocks, dim, n), jnp.where(in_range, ids, -1)


def slots_fit(
    n: int, operands: tuple[jax.Array, ...], dims: Dims, block_size: int, layer_blocks: int
) -> bool:
    """Whether `fold_slots` can count all slots."""
    del layer_blocks
    num_blocks, times = shape_of_one(operands[0], dims[0])[0], 1 if dims[0] is None else n
    shifted = dims[0] is not None or dims[3] is not None
    return not shifted or times * num_blocks * block_size <= _limits.INT32_MAX


def fold_slots(
    n: int, operands: tuple[jax.Array, ...], dims: Dims, block_size: int, layer_blocks: int
) -> tuple[tuple[jax.Array, ...], int]:
    """A cache whose rows are named by slot, with n * b sequences; and its layer_blocks.

    operands: blocks, indices and topk_length (with b first), and first_block. Where blocks or
    first_block are mapped, slots then count from the beginning of the whole array.
    """
    blocks, indices, lengths, first = operands
    blocks_dim, indices_dim, lengths_dim, first_dim = dims
    indices, lengths = fold(indices, indices_dim, n), fold(lengths, lengths_dim, n)
    if blocks_dim is None and first_dim is None:
        return (blocks, indices, lengths, first), layer_blocks
    num_blocks = shape_of_one(blocks, blocks_dim)[0]
    first = jnp.broadcast_to(jnp.clip(first, 0, num_blocks - layer_blocks), n)
    if blocks_dim is not None:
        first = first + jnp.arange(n, dtype=jnp.int32) * num_blocks
        blocks = fold(blocks, blocks_dim, n)
    inside = (indices >= 0) & (indices < layer_blocks * block_size)
    shift = jnp.repeat(first * block_size, indices.shape[0] // n)[:, None, None]
    indices = jnp.where(inside, indices + shift, -1)
    return (blocks, indices, lengths, jnp.zeros((), jnp.int32)), blocks.shape[0]


def fold_layer(
    n: int, operands: tuple[jax.Array, ...], dims: Dims, block_size: int, layer_blocks: int
) -> tuple[tuple[jax.Array, ...], int]:
    """A layer whose blocks a table names, with n * b sequences; and its layer_blocks.

    operands: blocks, block_table [b, max_blocks] and first_block. Where blocks or first_block are
    mapped, ids then count from the beginning of the whole array; one that was outside the layer is
    -1.
    """
    blocks, block_table, first = operands
    blocks_dim, table_dim, first_dim = dims
    block_table = fold(block_table, table_dim, n)
    if blocks_dim is None and first_dim is None:
        return (blocks, block_table, first), layer_blocks
    num_blocks, times = shape_of_one(blocks, blocks_dim)[0], 1 if blocks_dim is None else n
    if times * num_blocks * block_size > _limits.INT32_MAX:
        raise ValueError(
            "blocks under vmap must hold at most 2^31 - 1 slots over the mapped axis, got "
            f"{times} times {num_blocks} blocks of {block_size}"
        )
    first = jnp.broadcast_to(jnp.clip(first, 0, num_blocks - layer_blocks), n)
    if blocks_dim is not None:
        first = first + jnp.arange(n, dtype=jnp.int32) * num_blocks
        blocks = fold(blocks, blocks_dim, n)
    inside = (block_table >= 0) & (block_table < layer_blocks)
    ids = block_table + jnp.repeat(first, block_table.shape[0] // n)[:, None]
    return (blocks, jnp.where(inside, ids, -1), jnp.zeros((), jnp.int32)), blocks.shape[0]


def call_each(
    call: Callable[..., Sequence[jax.Array]], operands: tuple[jax.Array, ...], dims: Dims
) -> list[jax.Array]:
    """One call after the other, the results stacked: where the mapped axis cannot be folded."""
    mapped = [jnp.moveaxis(x, d, 0) for x, d in zip(operands, dims, strict=True) if d is not None]

    def one(here: list[jax.Array]) -> list[jax.Array]:
        rest = iter(here)
        whole = [x if d is None else next(rest) for x, d in zip(operands, dims, strict=True)]
        return list(call(*whole))

    return jax.lax.map(one, mapped)


def check_folded(operation: str, n: int, b: int) -> None:
    if n * b > _limits.MAX_BATCH:
        raise ValueError(
            f"{operation} under vmap must have at most {_limits.MAX_BATCH} sequences over the "
            f"mapped axis (it is folded into b), got {n} times b = {b}"
        )
