"""What users may pass: every rule on rank, shape, dtype and supported values, each stated once.

Each `check_*` function takes an operation's arguments as the user gave them (arrays, tracers or
anything else), raises an error that names the argument, what was expected and what came, and
returns the types of the results.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_flashmla._limits import INT32_MAX, MAX_BATCH, MAX_PARTS

FLOAT32_TINY, FLOAT32_MAX = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)

CACHE_DTYPES = (np.dtype(jnp.bfloat16), np.dtype(np.float16), np.dtype(np.float32))
_SM90_DTYPES = CACHE_DTYPES[:2]
_SM90_BLOCK_SIZES = (16, 32, 64, 128, 256)
_INT32 = (np.dtype(np.int32),)


class DecodeResult(NamedTuple):
    out: jax.ShapeDtypeStruct
    lse: jax.ShapeDtypeStruct


def check_dense_decode(
    q: Any,
    blocks: Any,
    block_table: Any,
    cache_seqlens: Any,
    *,
    d_v: Any,
    sm_scale: Any,
    causal: Any,
) -> DecodeResult:
    b, s_q, h_q, d_qk = _check_array("q", q, "[b, s_q, h_q, d_qk]", CACHE_DTYPES)
    _check_batch("q", b)
    num_blocks, block_size, h_kv, cache_d = _check_array(
        "blocks", blocks, "[num_blocks, block_size, h_kv, d_qk]", CACHE_DTYPES
    )
    if blocks.dtype != q.dtype:
        raise TypeError(f"blocks must have q's dtype {q.dtype}, got {blocks.dtype}")
    if cache_d != d_qk:
        raise ValueError(
            f"blocks must have rows of q's d_qk = {d_qk}, got {cache_d} in shape {blocks.shape}"
        )
    if b * s_q * h_q > INT32_MAX:
        raise ValueError(
            "q must have less than 2^31 rows b * s_q * h_q, got "
            f"{b} * {s_q} * {h_q} = {b * s_q * h_q}"
        )
    if h_q % h_kv:
        raise ValueError(f"q's h_q must be a multiple of blocks' h_kv = {h_kv}, got h_q = {h_q}")
    check_block_table(block_table, b, block_size)
    check_per_sequence("cache_seqlens", cache_seqlens, b)
    d_v = check_int("d_v", d_v, 1, INT32_MAX)
    if d_v > d_qk:
        raise ValueError(
            f"d_v must be at most d_qk = {d_qk} (a value is a row's first d_v columns), got {d_v}"
        )
    _check_bool("causal", causal)
    if sm_scale is not None:
        _check_scale(sm_scale)
    return DecodeResult(
        jax.ShapeDtypeStruct((b, s_q, h_q, d_v), q.dtype),
        jax.ShapeDtypeStruct((b, s_q, h_q), jnp.float32),
    )


def check_schedule(schedule_b: Any, cuts: Any, b: int) -> None:
    """The parts of a SplitSchedule that dense_decode is given for a batch of b sequences."""
    shape = _check_array("schedule.cuts", cuts, "[num_parts + 1, 2]", _INT32)
    if shape[0] < 2 or shape[1] != 2:
        raise ValueError(
            "schedule.cuts must have shape [num_parts + 1, 2] with num_parts >= 1, got shape "
            f"{cuts.shape}"
        )
    if shape[0] - 1 > MAX_PARTS:
        raise ValueError(
            f"schedule.cuts must be of at most num_parts = {MAX_PARTS}, got shape {cuts.shape}"
        )
    if schedule_b != b:
        raise ValueError(
            f"schedule must be made for q's batch of b = {b} sequences, got one made for "
            f"b = {schedule_b}"
        )


def check_make_schedule(
    cache_seqlens: Any, num_parts: Any, batch_invariant: Any, max_seqlen: Any
) -> int:
    """The number of sequences. num_parts and max_seqlen may be None."""
    b = check_cache_seqlens(cache_seqlens)
    if num_parts is not None:
        check_int("num_parts", num_parts, 1, MAX_PARTS)
    if max_seqlen is not None:
        check_int("max_seqlen", max_seqlen, 0, INT32_MAX)
    _check_bool("batch_invariant", batch_invariant)
    return b


def check_heads(h_q: Any, h_kv: Any, s_q: Any) -> None:
    h_kv = check_int("h_kv", h_kv, 1, INT32_MAX)
    h_q = check_int("h_q", h_q, 1, INT32_MAX)
    check_int("s_q", s_q, 1, INT32_MAX)
    if h_q % h_kv:
        raise ValueError(f"h_q must be a multiple of h_kv = {h_kv}, got h_q = {h_q}")


def check_cache_append(
    blocks: Any, rows: Any, block_table: Any, positions: Any, num_new: Any
) -> jax.ShapeDtypeStruct:
    num_blocks, block_size, h_kv, row = _check_array(
        "blocks", blocks, "[num_blocks, block_size, h_kv, row]", CACHE_DTYPES
    )
    b, s_new, *rest = _check_array("rows", rows, "[b, s_new, h_kv, row]", CACHE_DTYPES)
    _check_batch("rows", b)
    if rows.dtype != blocks.dtype:
        raise TypeError(f"rows must have blocks' dtype {blocks.dtype}, got {rows.dtype}")
    if rest != [h_kv, row]:
        raise ValueError(
            f"rows must end in blocks' [h_kv, row] = [{h_kv}, {row}], got shape {rows.shape}"
        )
    check_block_table(block_table, b, block_size)
    check_per_sequence("positions", positions, b)
    if num_new is not None:
        check_per_sequence("num_new", num_new, b)
    return jax.ShapeDtypeStruct(blocks.shape, blocks.dtype)


def check_copy_blocks(blocks: Any, src: Any, dst: Any) -> None:
    _check_array("blocks", blocks, "[num_blocks, block_size, h_kv, row]", CACHE_DTYPES)
    shape = _check_array("src", src, "[n]", _INT32, may_be_empty=True)
    if _check_array("dst", dst, "[n]", _INT32, may_be_empty=True) != shape:
        raise ValueError(f"dst must have src's shape {shape}, got {dst.shape}")


def check_implementation(implementation: Any) -> None:
    if implementation is not None and implementation not in ("kernel", "xla"):
        raise ValueError(f'implementation must be None, "kernel" or "xla", got {implementation!r}')


def sm90_refusal(d_qk: int, d_v: int, block_size: int, dtype: Any) -> str | None:
    """Why the Hopper kernel does not take these dimensions or dtype; None where it does."""
    if np.dtype(dtype) not in _SM90_DTYPES:
        return f"the sm90 kernel takes {dtype_names(_SM90_DTYPES)}, got {np.dtype(dtype)}"
    if (d_qk, d_v) == (576, 512) and block_size in _SM90_BLOCK_SIZES:
        return None
    return (
        "the sm90 kernel takes d_qk = 576, d_v = 512 and block_size = "
        f"{one_of(_SM90_BLOCK_SIZES)}, got d_qk = {d_qk}, d_v = {d_v} and block_size = {block_size}"
    )


def check_cache_seqlens(cache_seqlens: Any) -> int:
    """The number of sequences."""
    (b,) = _check_array("cache_seqlens", cache_seqlens, "[b]", _INT32)
    _check_batch("cache_seqlens", b)
    return b


def check_block_table(block_table: Any, b: int, block_size: int) -> None:
    table_b, max_blocks = _check_array("block_table", block_table, "[b, max_blocks]", _INT32)
    if table_b != b:
        raise ValueError(
            f"block_table must have one row per sequence, b = {b}, got shape {block_table.shape}"
        )
    if max_blocks * block_size > INT32_MAX:
        raise ValueError(
            "block_table must hold at most 2^31 - 1 tokens per sequence, got max_blocks = "
            f"{max_blocks} of block_size = {block_size}"
        )


def check_per_sequence(name: str, x: Any, b: int) -> None:
    if _check_array(name, x, "[b]", _INT32) != (b,):
        raise ValueError(f"{name} must have one entry per sequence, b = {b}, got shape {x.shape}")


def check_int(name: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} must be a Python int (it is compiled in), got {_describe(value)}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be between {low} and {high}, got {value}")
    return int(value)


def _check_bool(name: str, value: Any) -> None:
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be a Python bool (it is compiled in), got {_describe(value)}")


def _check_scale(sm_scale: Any) -> None:
    number = int | float | np.integer | np.floating
    if isinstance(sm_scale, bool) or not isinstance(sm_scale, number):
        raise TypeError(
            f"sm_scale must be a Python number (it is compiled in), got {_describe(sm_scale)}"
        )
    if not FLOAT32_TINY <= sm_scale <= FLOAT32_MAX:
        raise ValueError(f"sm_scale must be finite and positive in float32, got {sm_scale}")


def _check_batch(name: str, b: int) -> None:
    if b > MAX_BATCH:
        raise ValueError(f"{name} must have at most b = {MAX_BATCH} sequences, got {b}")


def _check_array(
    name: str, x: Any, dims: str, dtypes: tuple[np.dtype, ...], *, may_be_empty: bool = False
) -> tuple[int, ...]:
    """The shape of x, an array with the named dimensions."""
    if not (hasattr(x, "shape") and hasattr(x, "dtype")):
        raise TypeError(f"{name} must be an array {dims}, got {_describe(x)}")
    rank = dims.count(",") + 1
    if len(x.shape) != rank:
        raise ValueError(f"{name} must have rank {rank} {dims}, got shape {tuple(x.shape)}")
    if x.dtype not in dtypes:
        raise TypeError(f"{name} must have dtype {dtype_names(dtypes)}, got {x.dtype}")
    if 0 in x.shape and not may_be_empty:
        raise ValueError(f"{name} {dims} must have no empty dimension, got shape {tuple(x.shape)}")
    if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer) and x.is_deleted():
        raise ValueError(
            f"{name} must be a live array, got one that was donated or deleted: use the array "
            "that the donating call returned"
        )
    return tuple(x.shape)


def dtype_names(dtypes: tuple[np.dtype, ...]) -> str:
    return one_of(dtype.name for dtype in dtypes)


def one_of(choices: Iterable[Any]) -> str:
    """The choices as a sentence has them: a, b or c."""
    *others, last = map(str, choices)
    return f"{', '.join(others)} or {last}" if others else last


def _describe(value: Any) -> str:
    if isinstance(value, jax.core.Tracer):
        return f"a traced value of type {jax.typeof(value)}"
    return f"{value!r} of type {type(value).__name__}"
