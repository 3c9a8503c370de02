"""How the rows of a paged cache are stored."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from jax_flashmla import _checks, _limits

if TYPE_CHECKING:
    from jax.typing import DTypeLike


class Layout(NamedTuple):
    """A named format: columns of a row and of its value, and each plane's bytes of a token."""

    d_qk: int
    d_v: int
    planes: tuple[int, ...]
    block_multiple: int = 1  # bytes that a block's size is padded to a multiple of


LAYOUTS = {  # layout_of in csrc/formats.h
    "v32": Layout(576, 512, (656,)),
    "v32_nope": Layout(512, 512, (528,)),
    "v4": Layout(512, 512, (576, 8), 576),
    "v41": Layout(512, 512, (528,)),
    "v41_fp4": Layout(512, 512, (288,)),
    "fp8_row": Layout(576, 512, (576,)),
    "fp8_index": Layout(128, 128, (128, 4)),
}
INDEX_BLOCK_SIZE = 64  # tokens; fp8_index has blocks of these only


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheFormat:
    """How one token's row is stored, and how many rows make a block. Static and hashable.

    `CacheFormat(name="v32", block_size=64)` is enough for the named formats: they know their
    columns, and have h_kv = 1.

    | name | bytes of a token | content |
    |---|---|---|
    | `dense` | h_kv * row_stride * itemsize | rows as they are |
    | `v32` | 656 | 512 e4m3, 4 float32 scales (one per 128 columns), 64 bfloat16 rope columns |
    | `v32_nope` | 528 | 512 e4m3, 4 float32 scales |
    | `v4` | 584 | 448 e4m3, 64 bfloat16 rope columns; in a plane of their own 7 ue8m0 scales |
    | `v41` | 528 | 512 e4m3, 16 ue8m0 scales (one per 32 columns) |
    | `v41_fp4` | 288 | 512 e2m1, 32 e4m3 scales (one per 16 columns) |
    | `fp8_row` | 576 | 576 e4m3; one float32 scale for the whole cache, an argument of operations |
    | `fp8_index` | 132 | 128 e4m3; in a plane of their own float32 scales, one a token |

    Args:
        d_qk: columns of a row: the latent, then the rotary key. By default the format's; 576.
        d_v: leading columns of a row that are its value. By default the format's; 512.
        h_kv: KV heads; 1 for multi-head latent attention, and in all formats but `dense`.
        block_size: tokens of a block; 64 in `fp8_index`.
        dtype: of rows and queries: bfloat16, float16, or, in `dense`, float32, which the Hopper
            kernel does not take.
        name: the format.
        row_stride: `dense` only: columns from one row to the next, at least d_qk, which it is by
            default. What lies between may hold anything.

    Raises:
        ValueError, TypeError: a number, name or dtype that no cache can have.
    """

    d_qk: int = None  # type: ignore[assignment]  # filled in by __post_init__
    d_v: int = None  # type: ignore[assignment]
    h_kv: int = 1
    block_size: int = 64
    dtype: DTypeLike = jnp.bfloat16
    name: str = "dense"
    row_stride: int | None = None

    def __post_init__(self) -> None:
        if not _checks.is_name(self.name, _limits.FORMATS):
            names = _checks.one_of(f'"{name}"' for name in _limits.FORMATS)
            raise ValueError(f"name must be {names}, got {_checks.short(self.name)}")
        set_ = lambda name, value: object.__setattr__(self, name, value)  # noqa: E731
        layout = LAYOUTS.get(self.name, Layout(576, 512, ()))
        for name in ("d_qk", "d_v"):
            value = getattr(self, name)
            value = getattr(layout, name) if value is None else value
            set_(name, _checks.check_int(name, value, 1, _limits.INT32_MAX))
        for name in ("h_kv", "block_size"):
            set_(name, _checks.check_int(name, getattr(self, name), 1, _limits.INT32_MAX))
        if self.d_v > self.d_qk:
            raise ValueError(f"d_v must be at most d_qk = {self.d_qk}, got {self.d_v}")
        dtype = _checks.as_dtype("dtype", self.dtype)
        dtypes = _checks.CACHE_DTYPES if self.name == "dense" else _checks.CACHE_DTYPES[:2]
        if dtype not in dtypes:
            raise TypeError(f"dtype must be {_checks.dtype_names(dtypes)}, got {dtype}")
        set_("dtype", dtype)
        if self.name != "dense":
            self._check_named(layout)
        elif self.row_stride is not None:
            stride = _checks.check_int("row_stride", self.row_stride, 1, _limits.INT32_MAX)
            if stride < self.d_qk:
                raise ValueError(f"row_stride must be at least d_qk = {self.d_qk}, got {stride}")
            # None is d_qk's own, so that equal formats are equal.
            set_("row_stride", None if stride == self.d_qk else stride)

    def _check_named(self, layout: Layout) -> None:
        fixed = {"d_qk": layout.d_qk, "d_v": layout.d_v, "h_kv": 1, "row_stride": None}
        if self.name == "fp8_index":
            fixed["block_size"] = INDEX_BLOCK_SIZE
        for name, value in fixed.items():
            if getattr(self, name) != value:
                raise ValueError(
                    f'{name} must be {value} in format "{self.name}", got {getattr(self, name)}'
                )

    @property
    def storage_dtype(self) -> jnp.dtype:
        """The dtype of blocks: that of rows in `dense`, else uint8."""
        return jnp.dtype(self.dtype if self.name == "dense" else jnp.uint8)

    @property
    def planes(self) -> tuple[int, ...]:
        """Bytes of a token in each plane of a block."""
        return LAYOUTS[self.name].planes if self.name != "dense" else (self.bytes_per_token,)

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token takes in one layer, without the padding of blocks."""
        if self.name != "dense":
            return sum(LAYOUTS[self.name].planes)
        return self.h_kv * (self.row_stride or self.d_qk) * self.storage_dtype.itemsize

    @property
    def block_bytes(self) -> int:
        """Bytes of a block, padding included."""
        multiple = 1 if self.name == "dense" else LAYOUTS[self.name].block_multiple
        return -(-self.block_size * self.bytes_per_token // multiple) * multiple

    @property
    def block_shape(self) -> tuple[int, ...]:
        """A block's shape: [block_size, h_kv, row_stride] in `dense`, [block_size, 1, bytes] with
        one plane, [block_bytes] with several."""
        if self.name == "dense":
            return self.block_size, self.h_kv, self.row_stride or self.d_qk
        if len(self.planes) > 1:
            return (self.block_bytes,)
        return self.block_size, 1, self.bytes_per_token

    def allocate(self, num_blocks: int, *, device: Any = None) -> jax.Array:
        """Zeroed blocks [num_blocks, *block_shape].

        Args:
            num_blocks: how many.
            device: a `jax.Device` or `jax.sharding.Sharding` to put them on; JAX's default if None.

        Raises:
            ValueError, TypeError: `num_blocks` is not an int between 1 and 2^31 - 1, or `device` is
                neither.
        """
        if not isinstance(device, jax.Device | jax.sharding.Sharding | None):
            raise TypeError(
                "device must be a jax.Device, a jax.sharding.Sharding or None, got "
                f"{_checks.describe(device)}"
            )
        num_blocks = _checks.check_int("num_blocks", num_blocks, 1, _limits.INT32_MAX)
        return jnp.zeros((num_blocks, *self.block_shape), self.storage_dtype, device=device)


def format_of_blocks(format: CacheFormat | None, blocks: Any, prefix: str = "") -> CacheFormat:
    """The format of an operation's blocks [num_blocks, *block_shape], which are checked against it.

    Without a format they are dense, and their shape and dtype say the rest. Messages name both
    arguments with the prefix.
    """
    name = f"{prefix}blocks"
    if format is None:
        if getattr(blocks, "dtype", None) == jnp.uint8:
            raise TypeError(
                f"{prefix}format must be given for {name} of uint8, whose bytes do not say what "
                'they hold: CacheFormat(name="v32", ...) or another'
            )
        _, block_size, h_kv, d_qk = _checks.check_array(
            name, blocks, "[num_blocks, block_size, h_kv, d_qk]", _checks.CACHE_DTYPES
        )
        return CacheFormat(
            d_qk=d_qk, d_v=d_qk, h_kv=h_kv, block_size=block_size, dtype=blocks.dtype
        )
    if not isinstance(format, CacheFormat):
        raise TypeError(
            f"{prefix}format must be a CacheFormat or None, got {_checks.describe(format)}"
        )
    dims = ["block_bytes"] if len(format.block_shape) == 1 else ["block_size", "h_kv", "row"]
    shape = _checks.check_array(
        name, blocks, f"[num_blocks, {', '.join(dims)}]", (format.storage_dtype,)
    )
    if shape[1:] != format.block_shape:
        raise ValueError(
            f"{name} must be [num_blocks, {', '.join(map(str, format.block_shape))}] in the given "
            f"format, got shape {shape}"
        )
    return format
