"""Writing to a paged cache: operations that update the blocks in place where they are donated."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jax_flashmla import _checks, _ffi


def cache_append(
    blocks: jax.Array,
    rows: jax.Array,
    block_table: jax.Array,
    positions: jax.Array,
    *,
    num_new: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Writes each sequence's new rows into its blocks, from a token position on.

    Row j of sequence i goes to token position `p = positions[i] + j`: slot `p % block_size` of
    block `block_table[i, p // block_size]`. It is dropped, and nothing written, where p is negative
    or past the table, or where the block's id is outside [0, num_blocks). Two sequences must not be
    given the same slot: which of their rows it then holds is not defined.

    The update is in place inside a jitted function whose caller donates `blocks`, loops included.
    Otherwise XLA copies the whole cache first. Under `jax.vmap` it does so even where the cache is
    donated; where `blocks` is not mapped, the result is a cache for each index. To write to one
    cache in place, make the mapped axis part of b instead.

    Args:
        blocks: the cache [num_blocks, block_size, h_kv, row], bfloat16, float16 or float32.
        rows: new rows [b, s_new, h_kv, row], of the same dtype.
        block_table: block ids [b, max_blocks], int32.
        positions: token position [b] of each sequence's first new row, int32.
        num_new: how many of the s_new rows to write [b], int32, clamped to [0, s_new]; by default
            all.
        implementation: None picks the platform's best; "kernel" insists on the handler; "xla" is
            the pure-JAX reference.

    Returns:
        The updated blocks.

    Raises:
        ValueError, TypeError: a rank, shape, dtype or option that does not fit.
        NotImplementedError: "kernel" where there is none.
    """
    _checks.check_implementation(implementation)
    _checks.check_cache_append(blocks, rows, block_table, positions, num_new)
    if num_new is None:
        num_new = jnp.full(rows.shape[:1], rows.shape[1], jnp.int32)
    return _ffi.cache_append(
        blocks, rows, block_table, positions, num_new, implementation=implementation
    )


def copy_blocks(blocks: jax.Array, src: jax.Array, dst: jax.Array) -> jax.Array:
    """Copies block `src[i]` over block `dst[i]`, for all i at once, as the cache was before.

    `src` and `dst` come from `BlockAllocator.plan_copies`. A pair with an id outside
    [0, num_blocks), such as the padding, copies nothing. The ids in `dst` must differ.

    `blocks` is donated: called outside jit, the copy is in place, and the array passed in is gone
    afterwards.

    Args:
        blocks: the cache [num_blocks, block_size, h_kv, row], bfloat16, float16 or float32.
        src: ids of the blocks to read [n], int32.
        dst: ids of the blocks to overwrite [n], int32.

    Returns:
        The updated blocks.

    Raises:
        ValueError, TypeError: a rank, shape or dtype that does not fit.
    """
    _checks.check_copy_blocks(blocks, src, dst)
    return _copy_blocks(blocks, src, dst)


@functools.partial(jax.jit, donate_argnums=0)
def _copy_blocks(blocks: jax.Array, src: jax.Array, dst: jax.Array) -> jax.Array:
    num_blocks = blocks.shape[0]
    valid = (src >= 0) & (src < num_blocks) & (dst >= 0)
    copied = blocks[jnp.where(valid, src, 0)]
    return blocks.at[jnp.where(valid, dst, num_blocks)].set(copied, mode="drop")
