"""Which calls of dense_decode the kernels take, and why not others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from jax_flashmla import _checks
from jax_flashmla._xla.dispatch import platform_refusal
from jax_flashmla.cache.format import CacheFormat

if TYPE_CHECKING:
    from jax.typing import DTypeLike

_SM90_DTYPES = _checks.CACHE_DTYPES[:2]
_SM90_BLOCK_SIZES = (16, 32, 64, 128, 256)
_FP8_BLOCK_UNIT = 8  # rows that TMA can bring to any multiple of in shared memory


def kernel_refusal(
    platform: str,
    *,
    d_qk: int = 576,
    d_v: int = 512,
    block_size: int = 64,
    dtype: DTypeLike = jnp.bfloat16,
) -> str | None:
    """Why this installation does not run dense_decode's kernels on a platform; None where it does.

    Where there is no CUDA device, "cuda" is answered for a machine that has the right one: code can
    be lowered here to run there.

    Args:
        platform: as JAX names it: "cpu", "cuda" or another; "gpu" is taken as "cuda".
        d_qk: columns of a key.
        d_v: columns of a value.
        block_size: tokens of a block.
        dtype: of queries and cache.

    Raises:
        TypeError: `dtype` is none.
    """
    platform = "cuda" if platform == "gpu" else platform
    refusal = platform_refusal(platform)
    if refusal is not None or platform == "cpu":
        return refusal
    return _dimensions_refusal(d_qk, d_v, block_size, _checks.as_dtype("dtype", dtype))


def _dimensions_refusal(d_qk: int, d_v: int, block_size: int, dtype: Any) -> str | None:
    """Why the Hopper kernel does not take these dimensions or dtype; None where it does."""
    if dtype not in _SM90_DTYPES:
        return f"the sm90 kernel takes {_checks.dtype_names(_SM90_DTYPES)}, got {dtype}"
    if (d_qk, d_v) == (576, 512) and block_size in _SM90_BLOCK_SIZES:
        return None
    return (
        "the sm90 kernel takes d_qk = 576, d_v = 512 and block_size = "
        f"{_checks.one_of(_SM90_BLOCK_SIZES)}, got d_qk = {d_qk}, d_v = {d_v} and block_size = "
        f"{block_size}"
    )


def _row_refusal(h_kv: int, row_stride: int) -> str | None:
    """Why the Hopper kernel does not take rows of so many columns, d_qk and padding."""
    # TMA takes strides of 16 bytes, and a map over several heads has them in steps of 64 columns.
    unit = 8 if h_kv == 1 else 64
    if row_stride % unit == 0:
        return None
    return (
        f"the sm90 kernel of dense_decode takes rows (row_stride) of a multiple of {unit} columns "
        f"with h_kv = {h_kv}, got {row_stride}"
    )


def _fp8_refusal(d_v: int, block_size: int, dtype: Any) -> str | None:
    """Why the Hopper kernel does not take a call over an fp8 cache; None where it does."""
    if dtype != jnp.bfloat16:
        return f"the sm90 kernel of dense_decode takes bfloat16 over fp8 caches, got {dtype}"
    if d_v == 512 and block_size % _FP8_BLOCK_UNIT == 0:
        return None
    return (
        "the sm90 kernel of dense_decode takes d_v = 512 and a block_size that is a multiple of "
        f"{_FP8_BLOCK_UNIT} over fp8 caches, got d_v = {d_v} and block_size = {block_size}"
    )


def sm90_refusal(d_qk: int, d_v: int, dtype: Any, format: CacheFormat) -> str | None:
    """Why the Hopper kernel does not take a call; None where it does."""
    if format.name != "dense":
        return _fp8_refusal(d_v, format.block_size, dtype)
    refusal = _dimensions_refusal(d_qk, d_v, format.block_size, dtype)
    return refusal or _row_refusal(format.h_kv, format.row_stride or format.d_qk)
