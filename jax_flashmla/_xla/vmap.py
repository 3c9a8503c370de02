"""vmap of operations: the mapped axis, of size n, is folded into b."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jax_flashmla import _limits

Dims = tuple[int | None, ...]


def mapped_size(operands: tuple[jax.Array, ...], dims: Dims) -> int:
    return next(x.shape[d] for x, d in zip(operands, dims, strict=True) if d is not None)


def fold(x: jax.Array, dim: int | None, n: int) -> jax.Array:
    """[b, ...] per mapped index as [n * b, ...]."""
    x = jnp.broadcast_to(x, (n, *x.shape)) if dim is None else jnp.moveaxis(x, dim, 0)
    return x.reshape(n * x.shape[1], *x.shape[2:])


def unfold(x: jax.Array, n: int) -> jax.Array:
    return x.reshape(n, x.shape[0] // n, *x.shape[1:])


def fold_blocks(
    blocks: jax.Array, dim: int | None, block_table: jax.Array, n: int
) -> tuple[jax.Array, jax.Array]:
    """n caches as one, and the table [n * b, max_blocks] with ids into it.

    An id that was out of range stays so: it must not reach into another cache.
    """
    num_blocks = blocks.shape[0 if dim != 0 else 1]
    if n * num_blocks > _limits.INT32_MAX:
        raise ValueError(
            "blocks under vmap must hold at most 2^31 - 1 blocks over the mapped axis, got "
            f"{n} times {num_blocks}"
        )
    first = jnp.arange(n, dtype=jnp.int32) * num_blocks
    in_range = (block_table >= 0) & (block_table < num_blocks)
    ids = block_table + jnp.repeat(first, block_table.shape[0] // n)[:, None]
    return fold(blocks, dim, n), jnp.where(in_range, ids, -1)


def check_folded(operation: str, n: int, b: int) -> None:
    if n * b > _limits.MAX_BATCH:
        raise ValueError(
            f"{operation} under vmap must have at most {_limits.MAX_BATCH} sequences over the "
            f"mapped axis (it is folded into b), got {n} times b = {b}"
        )
