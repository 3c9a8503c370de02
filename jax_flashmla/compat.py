"""FlashMLA's own names and conventions, so that code written for it ports by changing imports.

Differences from `dense_decode` and `sparse_decode`: lse is [b, h_q, s_q], and +inf in a row with
nothing to attend.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_flashmla import _checks, _limits
from jax_flashmla._num_parts import sparse_num_parts
from jax_flashmla.cache.format import CacheFormat
from jax_flashmla.ops.dense_decode import dense_decode
from jax_flashmla.ops.make_schedule import SplitSchedule, make_schedule
from jax_flashmla.ops.sparse_decode import sparse_decode
from jax_flashmla.ops.sparse_prefill import sparse_prefill


def get_mla_metadata(
    cache_seqlens: jax.Array | None = None,
    num_q_tokens_per_head_k: int | None = None,
    num_heads_k: int | None = None,
    num_heads_q: int | None = None,
    is_fp8_kvcache: bool = False,
    topk: int | None = None,
) -> tuple[SplitSchedule | None, jax.Array | None]:
    """The schedule of a decoding step, made once and used by every layer.

    Called without arguments, as FlashMLA's later versions are, it returns (None, None), and
    `flash_mla_with_kvcache` makes the schedule (once in a jitted step: XLA merges equal ones).

    Args:
        cache_seqlens: [b] int32, tokens in each sequence's cache.
        num_q_tokens_per_head_k: s_q * h_q // h_kv, the query rows that read one cache head.
        num_heads_k: h_kv, heads of the cache.
        num_heads_q: h_q; only sparse attention needs it.
        is_fp8_kvcache: changes nothing here.
        topk: of sparse attention, indices of a query token; its schedule has a row for each of the
            b * s_q query tokens. Above 16384 of them it returns (None, None). It is for a cache in
            "v32", as FlashMLA's is; with others, called without arguments is faster.

    Returns:
        tile_scheduler_metadata: a SplitSchedule, a pytree of one array.
        num_splits: [b + 1] int32, or [b * s_q + 1] of sparse attention; sequence (query token) i
            is computed in num_splits[i + 1] - num_splits[i] pieces.

    Raises:
        TypeError, ValueError: an argument is not as described.
    """
    _checks.check_bool("is_fp8_kvcache", is_fp8_kvcache)
    if cache_seqlens is None and num_q_tokens_per_head_k is None and num_heads_k is None:
        return None, None
    rows = _checks.check_int(
        "num_q_tokens_per_head_k", num_q_tokens_per_head_k, 1, _limits.INT32_MAX
    )
    h_kv = _checks.check_int("num_heads_k", num_heads_k, 1, _limits.INT32_MAX)
    if num_heads_q is not None:
        num_heads_q = _checks.check_int("num_heads_q", num_heads_q, 1, _limits.INT32_MAX)
        if rows * h_kv % num_heads_q:
            raise ValueError(
                "num_heads_q must divide num_q_tokens_per_head_k * num_heads_k = s_q * h_q = "
                f"{rows * h_kv}, got {num_heads_q}"
            )
    if topk is None:
        schedule = make_schedule(cache_seqlens, h_q=rows * h_kv, h_kv=h_kv)  # type: ignore[arg-type]
    else:
        topk = _checks.check_int("topk", topk, 1, _limits.INT32_MAX)
        if num_heads_q is None:
            raise TypeError("num_heads_q must be given with topk, got None")
        b = _checks.as_cache_seqlens(cache_seqlens).shape[0]
        tokens = b * (rows * h_kv // num_heads_q)
        if tokens > _limits.MAX_BATCH:
            return None, None
        lengths = jnp.full(tokens, topk, jnp.int32)
        tiles = tokens * -(-topk // _limits.SPLIT_TILE)
        num_parts = sparse_num_parts(tiles=tiles, h_q=num_heads_q, small_tiles=True)
        schedule = make_schedule(lengths, h_q=num_heads_q, num_parts=num_parts)
    sequence, tile = schedule.cuts[1:-1, 0], schedule.cuts[1:-1, 1]
    inside = jnp.where(tile > 0, sequence, schedule.b)  # a cut at tile 0 splits nothing
    pieces = 1 + jnp.bincount(inside, length=schedule.b + 1)[: schedule.b]
    num_splits = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(pieces, dtype=jnp.int32)])
    return schedule, num_splits


def flash_mla_with_kvcache(
    q: jax.Array,
    k_cache: jax.Array,
    block_table: jax.Array | None,
    cache_seqlens: jax.Array | None,
    head_dim_v: int,
    tile_scheduler_metadata: SplitSchedule | jax.Array | None,
    num_splits: jax.Array | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    is_fp8_kvcache: bool = False,
    indices: jax.Array | None = None,
    attn_sink: jax.Array | None = None,
    extra_k_cache: jax.Array | None = None,
    extra_indices_in_kvcache: jax.Array | None = None,
    topk_length: jax.Array | None = None,
    extra_topk_length: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`dense_decode`, or with indices `sparse_decode`, under FlashMLA's name, argument order and
    conventions.

    The format of an fp8 cache, uint8 or float8_e4m3fn, is told by its shape and by q's d_qk: for
    d_qk = 576 [num_blocks, block_size, 1, 656] is "v32"; for d_qk = 512 [num_blocks, block_bytes]
    is "v4", whose blocks are padded to a multiple of 576 bytes. Others are refused: 528 bytes may
    be "v32_nope" or "v41", so call `sparse_decode`, which takes the format.

    Args:
        q: [b, s_q, h_q, d_qk] bfloat16, float16 or float32.
        k_cache: [num_blocks, block_size, h_kv, d_qk] in q's dtype, or an fp8 cache.
        block_table: [b, max_blocks] int32; not read with indices.
        cache_seqlens: [b] int32, tokens in each sequence's cache, the new ones included; not read
            with indices.
        head_dim_v: d_v, columns of a value.
        tile_scheduler_metadata: the SplitSchedule of `get_mla_metadata`, its cuts alone, or None.
        num_splits: from `get_mla_metadata`; the schedule alone is enough, so it is not read.
        softmax_scale: by default d_qk ** -0.5.
        causal: query i sees keys below cache_seqlens - (s_q - 1 - i); False with indices.
        is_fp8_kvcache: whether k_cache and extra_k_cache are fp8 caches.
        indices: [b, s_q, topk] int32 slots; -1, or any other outside the cache, is not attended.
        attn_sink: [h_q] float32.
        extra_k_cache, extra_indices_in_kvcache: a cache that is attended together with k_cache.
        topk_length, extra_topk_length: [b] int32, leftmost indices that count.

    Returns:
        out: [b, s_q, h_q, d_v] in q's dtype, 0 in a row with nothing to attend.
        softmax_lse: [b, h_q, s_q] float32, natural log; +inf in a row with nothing to attend,
            where `merge_lse` wants -inf.

    Raises:
        TypeError, ValueError: an argument is not as described.
    """
    del num_splits
    b, s_q, _, d_qk = _checks.check_query(q)
    _checks.check_int("head_dim_v", head_dim_v, 1, d_qk)
    if softmax_scale is not None:
        _checks.check_number("softmax_scale", softmax_scale)
    _checks.check_bool("is_fp8_kvcache", is_fp8_kvcache)
    schedule = tile_scheduler_metadata
    if schedule is not None and not isinstance(schedule, SplitSchedule):
        name = "tile_scheduler_metadata"
        _checks.check_array(name, schedule, "[num_parts + 1, 2]", _checks.INT32)
        schedule = SplitSchedule(schedule, b=b if indices is None else b * s_q)
    blocks, format = _as_blocks("k_cache", k_cache, d_qk, q.dtype, is_fp8_kvcache)
    if indices is None:
        _refuse_without_indices(
            attn_sink=attn_sink,
            extra_k_cache=extra_k_cache,
            extra_indices_in_kvcache=extra_indices_in_kvcache,
            topk_length=topk_length,
            extra_topk_length=extra_topk_length,
        )
        out, lse = dense_decode(
            q,
            blocks,
            block_table,  # type: ignore[arg-type]  # None is refused by name
            cache_seqlens,  # type: ignore[arg-type]
            d_v=head_dim_v,
            sm_scale=softmax_scale,
            causal=causal,
            format=format,
            schedule=schedule,
        )
    else:
        _checks.check_bool("causal", causal)
        if causal:
            raise ValueError("causal must be False with indices, got True")
        extra, extra_format = None, None
        if extra_k_cache is not None:
            extra, extra_format = _as_blocks(
                "extra_k_cache", extra_k_cache, d_qk, q.dtype, is_fp8_kvcache
            )
        out, lse = sparse_decode(
            q,
            blocks,
            indices,
            format=format,
            d_v=head_dim_v,
            sm_scale=softmax_scale,
            topk_length=topk_length,
            attn_sink=attn_sink,
            extra_blocks=extra,
            extra_indices=extra_indices_in_kvcache,
            extra_format=extra_format,
            extra_topk_length=extra_topk_length,
            schedule=schedule,
        )
    lse = jnp.where(lse == -jnp.inf, jnp.inf, lse)
    return out, jnp.swapaxes(lse, 1, 2)


def flash_mla_sparse_fwd(
    q: jax.Array,
    kv: jax.Array,
    indices: jax.Array,
    sm_scale: float,
    d_v: int = 512,
    attn_sink: jax.Array | None = None,
    topk_length: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`sparse_prefill` under FlashMLA's name, argument order and conventions.

    Args:
        q: [s_q, h_q, d_qk] bfloat16, float16 or float32.
        kv: [s_kv, 1, d_qk] in q's dtype.
        indices: [s_q, 1, topk] int32 rows of kv; one outside [0, s_kv) is not attended.
        sm_scale: scale of the scores.
        d_v: columns of a value.
        attn_sink: [h_q] float32.
        topk_length: [s_q] int32, leftmost indices that count.

    Returns:
        out: [s_q, h_q, d_v] in q's dtype, 0 in a row with nothing to attend.
        max_logits: [s_q, h_q] float32, the largest of the scaled scores; -inf in such a row.
        lse: [s_q, h_q] float32, natural log; +inf in such a row.

    Raises:
        TypeError, ValueError: an argument is not as described.
    """
    indices = _checks.as_int32("indices", indices, "[s_q, 1, topk]")
    if indices.shape[1] != 1:
        raise ValueError(f"indices must be [s_q, 1, topk], got shape {indices.shape}")
    out, lse, max_logits = sparse_prefill(
        q,
        kv,
        indices[:, 0],
        d_v=d_v,
        sm_scale=sm_scale,
        topk_length=topk_length,
        attn_sink=attn_sink,
    )
    return out, max_logits, jnp.where(lse == -jnp.inf, jnp.inf, lse)


def _as_blocks(
    name: str, cache: Any, d_qk: int, dtype: Any, is_fp8: bool
) -> tuple[jax.Array, CacheFormat | None]:
    """A cache as our operations take it, and its format."""
    if not is_fp8:
        if getattr(cache, "dtype", None) in _BYTES:
            raise TypeError(f"{name} of {cache.dtype} needs is_fp8_kvcache = True")
        shape = _checks.check_array(
            name, cache, "[num_blocks, block_size, h_kv, d_qk]", _checks.CACHE_DTYPES
        )
        if (shape[-1], cache.dtype) != (d_qk, dtype):
            raise ValueError(
                f"{name} must have q's d_qk = {d_qk} and dtype {dtype}, got shape {shape} of "
                f"{cache.dtype}"
            )
        return cache, None
    _checks.refuse_foreign(name, cache, "[num_blocks, ...]")
    if cache.dtype not in _BYTES:
        raise TypeError(
            f"{name} must have dtype {_checks.dtype_names(_BYTES)} with is_fp8_kvcache, got "
            f"{cache.dtype}"
        )
    format = _format_of(cache.shape, d_qk, dtype)
    if format is None or cache.shape[1:] != format.block_shape:
        raise ValueError(
            f"{name} with is_fp8_kvcache must be [num_blocks, block_size, 1, 656] for d_qk = 576 "
            "(v32) or [num_blocks, block_bytes], block_bytes a multiple of 576, for d_qk = 512 "
            f"(v4), got shape {tuple(cache.shape)} for d_qk = {d_qk}: other formats go to "
            "sparse_decode, with their format"
        )
    if cache.dtype != jnp.uint8:
        cache = jax.lax.bitcast_convert_type(cache, jnp.uint8)
    return cache, format


_BYTES = (np.dtype(jnp.uint8), np.dtype(jnp.float8_e4m3fn))


def _format_of(shape: tuple[int, ...], d_qk: int, dtype: Any) -> CacheFormat | None:
    if len(shape) == 4 and d_qk == 576 and shape[1] >= 1:
        return CacheFormat(name="v32", block_size=shape[1], dtype=dtype)
    if len(shape) == 2 and d_qk == 512 and shape[1] >= 2 * 576:
        # 72 tokens of 584 bytes are 73 times 576: no two block sizes have as many bytes.
        return CacheFormat(name="v4", block_size=shape[1] // 576 * 72 // 73, dtype=dtype)
    return None


def _refuse_without_indices(**arguments: Any) -> None:
    for name, value in arguments.items():
        if value is not None:
            raise ValueError(
                f"{name} must be None without indices (it is of sparse attention), got a "
                f"{type(value).__name__}"
            )
