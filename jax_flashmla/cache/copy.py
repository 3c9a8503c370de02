"""Copying blocks, as forks ask for."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from jax_flashmla import _checks

if TYPE_CHECKING:
    from jax.typing import ArrayLike


def copy_blocks(blocks: jax.Array, src: ArrayLike, dst: ArrayLike) -> jax.Array:
    """Copies block `src[i]` over block `dst[i]`, for all i at once, as the cache was before.

    `src` and `dst` come from `BlockAllocator.plan_copies`. A pair with an id outside
    [0, num_blocks), such as the padding, copies nothing. The ids in `dst` must differ.

    `blocks` is donated: called outside jit, the copy is in place, and the array passed in is gone
    afterwards.

    Args:
        blocks: the cache [num_blocks, *block_shape], of any format.
        src: ids of the blocks to read [n], int32.
        dst: ids of the blocks to overwrite [n], int32.

    Returns:
        The updated blocks.

    Raises:
        ValueError, TypeError: a rank, shape or dtype that does not fit.
    """
    flat = getattr(blocks, "ndim", 4) == 2  # the blocks of formats with several planes
    dims = "[num_blocks, block_bytes]" if flat else "[num_blocks, block_size, h_kv, row]"
    _checks.check_array("blocks", blocks, dims, (*_checks.CACHE_DTYPES, np.dtype(np.uint8)))
    src = _checks.as_int32("src", src, "[n]", may_be_empty=True)
    dst = _checks.as_int32("dst", dst, "[n]", may_be_empty=True)
    if src.shape != dst.shape:
        raise ValueError(f"dst must have src's shape {src.shape}, got {dst.shape}")
    return _copy_blocks(blocks, src, dst)


@functools.partial(jax.jit, donate_argnums=0)
def _copy_blocks(blocks: jax.Array, src: jax.Array, dst: jax.Array) -> jax.Array:
    num_blocks = blocks.shape[0]
    valid = (src >= 0) & (src < num_blocks) & (dst >= 0)
    copied = blocks[jnp.where(valid, src, 0)]
    return blocks.at[jnp.where(valid, dst, num_blocks)].set(copied, mode="drop")
