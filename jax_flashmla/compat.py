"""FlashMLA's own names and conventions, so that code written for it ports by changing imports.

Differences from `dense_decode`: lse is [b, h_q, s_q], and +inf in a row with nothing to attend.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jax_flashmla import _checks, _limits
from jax_flashmla.ops.dense_decode import dense_decode
from jax_flashmla.ops.make_schedule import SplitSchedule, make_schedule


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
        num_heads_q: h_q; only FlashMLA's sparse attention needs it.
        is_fp8_kvcache: True is not supported.
        topk: sparse attention, not supported: None.

    Returns:
        tile_scheduler_metadata: a SplitSchedule, a pytree of one array.
        num_splits: [b + 1] int32; sequence i is computed in num_splits[i + 1] - num_splits[i]
            pieces.

    Raises:
        TypeError, ValueError: an argument is not as described.
        NotImplementedError: fp8 or sparse attention is asked for.
    """
    _refuse(is_fp8_kvcache=is_fp8_kvcache, topk=topk)
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
    schedule = make_schedule(cache_seqlens, h_q=rows * h_kv, h_kv=h_kv)  # type: ignore[arg-type]
    sequence, tile = schedule.cuts[1:-1, 0], schedule.cuts[1:-1, 1]
    inside = jnp.where(tile > 0, sequence, schedule.b)  # a cut at tile 0 splits nothing
    pieces = 1 + jnp.bincount(inside, length=schedule.b + 1)[: schedule.b]
    num_splits = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(pieces, dtype=jnp.int32)])
    return schedule, num_splits


def flash_mla_with_kvcache(
    q: jax.Array,
    k_cache: jax.Array,
    block_table: jax.Array,
    cache_seqlens: jax.Array,
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
    """`dense_decode` under FlashMLA's name, argument order and conventions.

    Args:
        q: [b, s_q, h_q, d_qk] bfloat16, float16 or float32.
        k_cache: [num_blocks, block_size, h_kv, d_qk] in q's dtype.
        block_table: [b, max_blocks] int32.
        cache_seqlens: [b] int32, tokens in each sequence's cache, the new ones included.
        head_dim_v: d_v, columns of a value.
        tile_scheduler_metadata: the SplitSchedule of `get_mla_metadata`, its cuts alone, or None.
        num_splits: from `get_mla_metadata`; the schedule alone is enough, so it is not read.
        softmax_scale: by default d_qk ** -0.5.
        causal: query i sees keys below cache_seqlens - (s_q - 1 - i).
        is_fp8_kvcache: True is not supported.
        indices, attn_sink, extra_k_cache, extra_indices_in_kvcache, topk_length,
            extra_topk_length: of sparse attention, not supported: None.

    Returns:
        out: [b, s_q, h_q, d_v] in q's dtype, 0 in a row with nothing to attend.
        softmax_lse: [b, h_q, s_q] float32, natural log; +inf in a row with nothing to attend.

    Raises:
        TypeError, ValueError: an argument is not as described.
        NotImplementedError: fp8 or sparse attention is asked for.
    """
    del num_splits
    _refuse(
        is_fp8_kvcache=is_fp8_kvcache,
        indices=indices,
        attn_sink=attn_sink,
        extra_k_cache=extra_k_cache,
        extra_indices_in_kvcache=extra_indices_in_kvcache,
        topk_length=topk_length,
        extra_topk_length=extra_topk_length,
    )
    schedule = tile_scheduler_metadata
    if schedule is not None and not isinstance(schedule, SplitSchedule):
        schedule = SplitSchedule(schedule, b=_checks.as_cache_seqlens(cache_seqlens).shape[0])
    out, lse = dense_decode(
        q,
        k_cache,
        block_table,
        cache_seqlens,
        d_v=head_dim_v,
        sm_scale=softmax_scale,
        causal=causal,
        schedule=schedule,
    )
    lse = jnp.where(lse == -jnp.inf, jnp.inf, lse)
    return out, jnp.swapaxes(lse, 1, 2)


def _refuse(*, is_fp8_kvcache: bool, **sparse: Any) -> None:
    if is_fp8_kvcache:
        raise NotImplementedError(
            f"is_fp8_kvcache must be False: fp8 caches are not supported, got {is_fp8_kvcache!r}"
        )
    for name, value in sparse.items():
        if value is not None:
            raise NotImplementedError(
                f"{name} must be None: sparse attention is not supported, got a "
                f"{type(value).__name__}"
            )
