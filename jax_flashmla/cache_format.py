"""How the rows of a paged cache are stored."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from jax_flashmla import _checks, _limits

if TYPE_CHECKING:
    from jax.typing import DTypeLike


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheFormat:
    """How one token's row is stored, and how many rows make a block. Static and hashable.

    Args:
        d_qk: columns of a row: the latent, then the rotary key.
        d_v: leading columns of a row that are its value.
        h_kv: KV heads; 1 for multi-head latent attention.
        block_size: tokens of a block.
        dtype: bfloat16, float16, or float32, which the Hopper kernel does not take.
        name: the layout. "dense", the only one so far: blocks [num_blocks, block_size, h_kv, d_qk].

    Raises:
        ValueError, TypeError: a number or dtype that no cache can have.
    """

    d_qk: int = 576
    d_v: int = 512
    h_kv: int = 1
    block_size: int = 64
    dtype: DTypeLike = jnp.bfloat16
    name: str = "dense"

    def __post_init__(self) -> None:
        if self.name != "dense":
            raise ValueError(f'name must be "dense", got {self.name!r}')
        for name in ("d_qk", "d_v", "h_kv", "block_size"):
            value = _checks.check_int(name, getattr(self, name), 1, _limits.INT32_MAX)
            object.__setattr__(self, name, value)
        if self.d_v > self.d_qk:
            raise ValueError(f"d_v must be at most d_qk = {self.d_qk}, got {self.d_v}")
        dtype = jnp.dtype(self.dtype)
        if dtype not in _checks.CACHE_DTYPES:
            raise TypeError(
                f"dtype must be {_checks.dtype_names(_checks.CACHE_DTYPES)}, got {dtype}"
            )
        object.__setattr__(self, "dtype", dtype)

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token takes in one layer."""
        return self.h_kv * self.d_qk * jnp.dtype(self.dtype).itemsize

    def allocate(self, num_blocks: int, *, device: Any = None) -> jax.Array:
        """Zeroed blocks [num_blocks, block_size, h_kv, d_qk].

        Args:
            num_blocks: how many.
            device: a `jax.Device` or `jax.sharding.Sharding` to put them on; JAX's default if None.

        Raises:
            ValueError, TypeError: `num_blocks` is not an int between 1 and 2^31 - 1.
        """
        num_blocks = _checks.check_int("num_blocks", num_blocks, 1, _limits.INT32_MAX)
        shape = (num_blocks, self.block_size, self.h_kv, self.d_qk)
        return jnp.zeros(shape, self.dtype, device=device)
