"""Rules on what users pass: arrays, ints, bools, scales, each stated once.

A `check_*` function raises an error that names the argument, what was expected and what came.
Host integers become int32 here and nowhere else (`as_int32`), range-checked.
"""

from __future__ import annotations

import reprlib
from collections.abc import Collection, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_flashmla._limits import INT32_MAX, MAX_BATCH, ROPE_LAYOUTS

FLOAT32_TINY, FLOAT32_MAX = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)

CACHE_DTYPES = (np.dtype(jnp.bfloat16), np.dtype(np.float16), np.dtype(np.float32))
INT32 = (np.dtype(np.int32),)


def check_implementation(implementation: Any) -> None:
    if implementation is not None and not is_name(implementation, ("kernel", "xla")):
        raise ValueError(
            f'implementation must be None, "kernel" or "xla", got {short(implementation)}'
        )


def check_query(q: Any) -> tuple[int, ...]:
    """b, s_q, h_q and d_qk."""
    b, s_q, h_q, d_qk = check_array("q", q, "[b, s_q, h_q, d_qk]", CACHE_DTYPES)
    if b * s_q * h_q > INT32_MAX:
        raise ValueError(
            "q must have less than 2^31 rows b * s_q * h_q, got "
            f"{b} * {s_q} * {h_q} = {b * s_q * h_q}"
        )
    return b, s_q, h_q, d_qk


def check_packed_query(q: Any) -> tuple[int, ...]:
    """T, h_q and d_qk."""
    num_tokens, h_q, d_qk = check_array("q", q, "[T, h_q, d_qk]", CACHE_DTYPES)
    if num_tokens * h_q > INT32_MAX:
        raise ValueError(
            "q must have less than 2^31 rows T * h_q, got "
            f"{num_tokens} * {h_q} = {num_tokens * h_q}"
        )
    return num_tokens, h_q, d_qk


def as_cu_q_lens(cu_q_lens: Any) -> jax.Array:
    """[b + 1] int32."""
    cu_q_lens = as_int32("cu_q_lens", cu_q_lens, "[b + 1]")
    if cu_q_lens.shape[0] < 2:
        raise ValueError(f"cu_q_lens must have b + 1 >= 2 entries, got shape {cu_q_lens.shape}")
    check_batch("cu_q_lens", cu_q_lens.shape[0] - 1)
    return cu_q_lens


def as_max_q_len(max_q_len: Any, num_tokens: int) -> int:
    """The most packed tokens of a sequence, by default and at most all."""
    if max_q_len is None:
        return num_tokens
    return min(check_int("max_q_len", max_q_len, 1, INT32_MAX), num_tokens)


def as_cache_seqlens(cache_seqlens: Any) -> jax.Array:
    """[b] int32."""
    cache_seqlens = as_int32("cache_seqlens", cache_seqlens, "[b]")
    check_batch("cache_seqlens", cache_seqlens.shape[0])
    return cache_seqlens


def as_block_table(block_table: Any, b: int, block_size: int) -> jax.Array:
    """[b, max_blocks] int32."""
    block_table = as_int32("block_table", block_table, "[b, max_blocks]")
    table_b, max_blocks = block_table.shape
    if table_b != b:
        raise ValueError(
            f"block_table must have one row per sequence, b = {b}, got shape {block_table.shape}"
        )
    if max_blocks * block_size > INT32_MAX:
        raise ValueError(
            "block_table must hold at most 2^31 - 1 tokens per sequence, got max_blocks = "
            f"{max_blocks} of block_size = {block_size}"
        )
    return block_table


def as_per_sequence(name: str, x: Any, b: int) -> jax.Array:
    """[b] int32."""
    x = as_int32(name, x, "[b]")
    if x.shape != (b,):
        raise ValueError(f"{name} must have one entry per sequence, b = {b}, got shape {x.shape}")
    return x


def as_kv_scale(kv_scale: Any, format: str) -> jax.Array:
    """[] float32, 1 by default; what `fp8_row` caches are multiplied with."""
    if kv_scale is None:
        return jnp.ones((), jnp.float32)
    if format != "fp8_row":
        raise ValueError(f'kv_scale must be None but in format "fp8_row", got one for "{format}"')
    number = int | float | np.integer | np.floating
    if isinstance(kv_scale, number) and not isinstance(kv_scale, bool):
        if not -FLOAT32_MAX <= kv_scale <= FLOAT32_MAX:
            raise ValueError(f"kv_scale must be finite in float32, got {kv_scale}")
        kv_scale = np.float32(kv_scale)
    check_array("kv_scale", kv_scale, "[]", (np.dtype(np.float32),))
    return jnp.asarray(kv_scale)


def as_sink(attn_sink: Any, h_q: int) -> jax.Array:
    """[h_q] float32, -inf (no sink) by default."""
    if attn_sink is None:
        return jnp.full(h_q, -jnp.inf, jnp.float32)
    shape = check_array("attn_sink", attn_sink, "[h_q]", (np.dtype(np.float32),))
    if shape != (h_q,):
        raise ValueError(f"attn_sink must have one entry per head, h_q = {h_q}, got shape {shape}")
    return jnp.asarray(attn_sink)


def check_layout(layout: Any) -> None:
    """How the columns that are rotated make pairs."""
    if not is_name(layout, ROPE_LAYOUTS):
        raise ValueError(f"layout must be one of {tuple(ROPE_LAYOUTS)}, got {short(layout)}")


def _as_angles(name: str, x: Any, shape: tuple[int, ...], dims: str, layout: str) -> jax.Array:
    """cos or sin of every row and pair, float32; empty where nothing is rotated."""
    if layout == "none":
        if x is not None:
            raise ValueError(f'{name} must be None with layout "none", got {describe(x)}')
        return jnp.zeros(shape, jnp.float32)
    got = check_array(name, x, dims, (np.dtype(np.float32),), may_be_empty=True)
    if got != shape:
        raise ValueError(f"{name} must have shape {shape}, got {got}")
    return jnp.asarray(x)


def as_rotation(
    cos: Any, sin: Any, layout: str, rope: int, rows: tuple[int, ...], dims: str
) -> tuple[jax.Array, jax.Array]:
    """cos and sin [*rows, rope / 2] float32 of rope columns; [*rows, 0] where none is rotated."""
    shape = (*rows, 0 if layout == "none" else rope // 2)
    return _as_angles("cos", cos, shape, dims, layout), _as_angles("sin", sin, shape, dims, layout)


def as_layer(layer: Any, layers: int, *, may_be_traced: bool = True) -> int | jax.Array:
    """An index below `layers`: a Python int, or a traced int32 scalar."""
    if may_be_traced and isinstance(layer, jax.core.Tracer):
        if layer.shape != () or not jnp.issubdtype(layer.dtype, jnp.integer):
            raise TypeError(f"layer must be an integer scalar, got {describe(layer)}")
        return layer.astype(jnp.int32)
    if isinstance(layer, jax.core.Tracer):
        raise TypeError(
            "layer must be known while tracing where each layer has an array of its own, got "
            f"{describe(layer)}"
        )
    integer = isinstance(layer, int | np.integer | np.ndarray | jax.Array)
    if not integer or isinstance(layer, bool) or jnp.shape(layer) != ():
        raise TypeError(f"layer must be an integer scalar, got {describe(layer)}")
    if not jnp.issubdtype(jnp.result_type(layer), jnp.integer):
        raise TypeError(f"layer must be an integer scalar, got {describe(layer)}")
    if not 0 <= int(layer) < layers:
        raise ValueError(f"layer must be between 0 and {layers - 1}, got {int(layer)}")
    return int(layer)


def as_first_block(name: str, value: Any, last: int) -> jax.Array:
    """[] int32: a layer's first block, at most `last`."""
    if isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be an integer scalar, got {describe(value)}")
    first = as_int32(name, value, "[]")
    traced = isinstance(value, jax.core.Tracer | jax.ShapeDtypeStruct)
    if not traced and not 0 <= int(value) <= last:
        raise ValueError(f"{name} must be between 0 and {last}, got {value}")
    return first


def check_int(name: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} must be a Python int (it is compiled in), got {describe(value)}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be between {low} and {high}, got {value}")
    return int(value)


def check_bool(name: str, value: Any) -> None:
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be a Python bool (it is compiled in), got {describe(value)}")


def check_batch(name: str, b: int) -> None:
    if b > MAX_BATCH:
        raise ValueError(f"{name} must have at most b = {MAX_BATCH} sequences, got {b}")


def as_int32(name: str, x: Any, dims: str, *, may_be_empty: bool = False) -> jax.Array:
    """An integer array with the named dimensions as int32.

    Values known on the host are range-checked. Traced ones of another width are clipped: an id or
    a length that was out of range stays so.
    """
    limits = np.iinfo(np.int32)
    if isinstance(x, int | list | tuple) and not isinstance(x, bool):
        try:
            x = np.asarray(x, None if np.size(x) else np.int32)
        except ValueError:
            raise ValueError(f"{name} must be {dims}, got lists of unequal lengths") from None
    refuse_foreign(name, x, dims)
    refuse_deleted(name, x)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise TypeError(f"{name} must have dtype int32, or another integer's, got {x.dtype}")
    if x.dtype != jnp.int32:
        if isinstance(x, jax.core.Tracer):
            low, high = (
                np.asarray(max(a, b) if a < 0 else min(a, b), x.dtype)
                for a, b in zip(
                    (limits.min, limits.max),
                    (int(jnp.iinfo(x.dtype).min), int(jnp.iinfo(x.dtype).max)),
                    strict=True,
                )
            )
            x = jnp.clip(x, low, high).astype(jnp.int32)
        else:
            x = np.asarray(x)
            if x.size and not (limits.min <= int(x.min()) and int(x.max()) <= limits.max):
                worst = int(x.max()) if int(x.max()) > limits.max else int(x.min())
                raise ValueError(f"{name} must fit in int32, got {worst}")
            x = x.astype(np.int32)
    check_array(name, x, dims, INT32, may_be_empty=may_be_empty)
    return x if isinstance(x, jax.ShapeDtypeStruct) else jnp.asarray(x)  # type: ignore[return-value]


def check_number(name: str, x: Any, *, zero: bool = False) -> float:
    """A Python number that is compiled in: positive, or 0 where `zero` says so."""
    if isinstance(x, bool) or not isinstance(x, int | float | np.integer | np.floating):
        raise TypeError(f"{name} must be a Python number (it is compiled in), got {describe(x)}")
    if not (FLOAT32_TINY <= x <= FLOAT32_MAX or (zero and x == 0)):
        raise ValueError(
            f"{name} must be finite and positive{' or 0' if zero else ''} in float32, got {x}"
        )
    return float(x)


def check_array(
    name: str, x: Any, dims: str, dtypes: tuple[np.dtype, ...], *, may_be_empty: bool = False
) -> tuple[int, ...]:
    """The shape of x, an array with the named dimensions."""
    refuse_foreign(name, x, dims)
    rank = 0 if dims == "[]" else dims.count(",") + 1
    if len(x.shape) != rank:
        raise ValueError(f"{name} must have rank {rank} {dims}, got shape {tuple(x.shape)}")
    if x.dtype not in dtypes:
        raise TypeError(f"{name} must have dtype {dtype_names(dtypes)}, got {x.dtype}")
    if not all(isinstance(n, int) for n in x.shape):
        raise NotImplementedError(
            f"{name} {dims} must have known extents, got shape {x.shape}: kernels are compiled for "
            "their shapes, so export once for each"
        )
    if 0 in x.shape and not may_be_empty:
        raise ValueError(f"{name} {dims} must have no empty dimension, got shape {tuple(x.shape)}")
    refuse_deleted(name, x)
    return tuple(x.shape)


def refuse_foreign(name: str, x: Any, dims: str) -> None:
    """What is neither JAX's nor NumPy's array."""
    if isinstance(x, np.ma.MaskedArray):
        raise TypeError(
            f"{name} must be a JAX or NumPy array {dims} without a mask, got a masked array: fill "
            "it first (numpy.ma.filled)"
        )
    if isinstance(x, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct):
        return
    if hasattr(x, "__dlpack__"):
        raise TypeError(
            f"{name} must be a JAX or NumPy array {dims}, got {type(x).__module__}."
            f"{type(x).__qualname__}: convert it with jax.dlpack.from_dlpack"
        )
    raise TypeError(f"{name} must be an array {dims}, got {describe(x)}")


def refuse_deleted(name: str, x: Any) -> None:
    """An array that a jitted function has taken over."""
    if _is_deleted(x):
        raise ValueError(
            f"{name} must be a live array, got one that was donated or deleted: use the array "
            "that the donating call returned"
        )


def refuse_donated(name: str, tree: Any) -> None:
    """A pytree with arrays that a jitted function has taken over."""
    if any(map(_is_deleted, jax.tree.leaves(tree))):
        raise ValueError(
            f"{name} must have live arrays, got one that was donated or deleted: use the "
            f"{name} that the donating call returned"
        )


def _is_deleted(x: Any) -> bool:
    return isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer) and x.is_deleted()


def axis_size(name: str, axis: Any) -> int:
    """Devices of a mesh axis, inside of a `jax.shard_map` over it."""
    try:
        return int(jax.lax.axis_size(axis))
    except (NameError, TypeError):  # TypeError: not hashable
        mapped = jax.sharding.get_abstract_mesh().manual_axes
        if not mapped:
            raise ValueError(
                f"{name} must be a mesh axis of the jax.shard_map that this is called inside of, "
                f"got {short(axis)} outside of any"
            ) from None
        raise ValueError(
            f"{name} must be one of the axes {tuple(mapped)} that jax.shard_map maps here, got "
            f"{short(axis)}"
        ) from None


def as_dtype(name: str, value: Any) -> np.dtype:
    try:
        return jnp.dtype(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a dtype, got {describe(value)}") from None


def dtype_names(dtypes: tuple[np.dtype, ...]) -> str:
    return one_of(dtype.name for dtype in dtypes)


def one_of(choices: Iterable[Any]) -> str:
    """The choices as a sentence has them: a, b or c."""
    *others, last = map(str, choices)
    return f"{', '.join(others)} or {last}" if others else last


def is_name(value: Any, names: Collection[str]) -> bool:
    """Whether it is one of the names; of what is no string, hashable or not, it is not."""
    return isinstance(value, str) and value in names


def describe(value: Any) -> str:
    if isinstance(value, jax.core.Tracer):
        return f"a traced value of type {jax.typeof(value)}"
    return f"{short(value)} of type {type(value).__name__}"


def short(value: Any) -> str:
    """The value for a message: shortened, and of arrays what they are."""
    return _SHORT.repr(value)


class _Short(reprlib.Repr):
    def repr1(self, x: Any, level: int) -> str:
        if _is_deleted(x):
            return "an array that was donated or deleted"
        if isinstance(x, jax.Array | np.ndarray) and x.size > self.maxlist:
            return f"an array {x.dtype}{list(x.shape)}"
        return super().repr1(x, level)


_SHORT = _Short()
_SHORT.maxother = 200  # a CacheFormat is shown whole
