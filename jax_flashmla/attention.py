"""Attention over a paged latent cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.export
import jax.numpy as jnp

from jax_flashmla import _checks, _ffi
from jax_flashmla.schedule import SplitSchedule, make_schedule

if TYPE_CHECKING:
    from jax.typing import DTypeLike


def dense_decode(
    q: jax.Array,
    blocks: jax.Array,
    block_table: jax.Array,
    cache_seqlens: jax.Array,
    *,
    d_v: int = 512,
    sm_scale: float | None = None,
    causal: bool = False,
    schedule: SplitSchedule | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Multi-head latent attention of a few queries per sequence over a paged cache.

    `out = softmax(sm_scale * q . keys) . values` with float32 accumulation. A cache row is a key,
    and its first d_v columns are the value; query head h reads cache head h // (h_q // h_kv). The
    same inputs give the same bits on the same device. Where the schedule cuts a sequence, the
    Hopper kernel rounds each piece's result to 11 bits before it merges them; a bfloat16 has 8.

    Args:
        q: [b, s_q, h_q, d_qk] bfloat16, float16 or float32; b at most 16384, and b * s_q * h_q
            below 2^31. The Hopper kernel takes no float32.
        blocks: [num_blocks, block_size, h_kv, d_qk] in q's dtype; h_kv divides h_q.
        block_table: [b, max_blocks] int32, each sequence's blocks in order. Entries past a
            sequence's length are never used; a block id outside [0, num_blocks) reads as zeros.
        cache_seqlens: [b] int32, tokens valid in each sequence's cache, the new ones included;
            clamped to [0, max_blocks * block_size]. Slots past the length may hold anything.
        d_v: columns of a value, at most d_qk.
        sm_scale: scale of the scores, finite and positive; by default d_qk ** -0.5.
        causal: query i sees keys below cache_seqlens - (s_q - 1 - i).
        schedule: the step's schedule from `make_schedule`; made here by default (and once only
            in a jitted step: XLA merges equal ones).
        implementation: None for the platform's best, "kernel" to insist on the handler, "xla" for
            pure JAX, which can be differentiated.

    Returns:
        out: [b, s_q, h_q, d_v] in q's dtype, 0 in a row with nothing to attend.
        lse: [b, s_q, h_q] float32, natural log; -inf in a row with nothing to attend.

    Raises:
        TypeError, ValueError: an argument is not as described.
        NotImplementedError: implementation is "kernel" and there is none for this platform, device
            or these dimensions; or the kernel is differentiated.
    """
    _checks.check_dense_decode(
        q, blocks, block_table, cache_seqlens, d_v=d_v, sm_scale=sm_scale, causal=causal
    )
    _checks.check_implementation(implementation)
    b, s_q, h_q, d_qk = q.shape
    if schedule is None:
        schedule = make_schedule(
            cache_seqlens,
            h_q=h_q,
            h_kv=blocks.shape[2],
            s_q=s_q,
            max_seqlen=block_table.shape[1] * blocks.shape[1],
            implementation=implementation,
        )
    elif not isinstance(schedule, SplitSchedule):
        raise TypeError(
            f"schedule must be a SplitSchedule from make_schedule, got {type(schedule).__name__}"
        )
    _checks.check_schedule(schedule.b, schedule.cuts, b)
    return _ffi.dense_decode(
        q,
        blocks,
        block_table,
        cache_seqlens,
        schedule.cuts,
        d_v=int(d_v),
        sm_scale=float(d_qk**-0.5 if sm_scale is None else sm_scale),
        causal=bool(causal),
        implementation=implementation,
    )


def export_checks() -> list[jax.export.DisabledSafetyCheck]:
    """What to pass as `disabled_checks` to `jax.export.export` for functions that decode.

    jax.export takes custom calls only where the caller vouches that their contract is stable; the
    targets' names carry a version for that. jax_flashmla must be imported where the result is run.
    """
    return [jax.export.DisabledSafetyCheck.custom_call(name) for name in _ffi.TARGETS.values()]


def kernel_refusal(
    platform: str,
    *,
    d_qk: int = 576,
    d_v: int = 512,
    block_size: int = 64,
    dtype: DTypeLike = jnp.bfloat16,
) -> str | None:
    """Why this installation does not run the kernels on a platform; None where it does.

    Where there is no CUDA device, "cuda" is answered for a machine that has the right one: code can
    be lowered here to run there.

    Args:
        platform: as JAX names it, "cpu" or "cuda" or another.
        d_qk: columns of a key.
        d_v: columns of a value.
        block_size: tokens of a block.
        dtype: of queries and cache.
    """
    return _ffi.kernel_refusal(platform, d_qk=d_qk, d_v=d_v, block_size=block_size, dtype=dtype)
