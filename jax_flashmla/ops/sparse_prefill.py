"""Attention over the rows of one array that indices name: sparse attention of whole prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_flashmla import _checks, _limits
from jax_flashmla._xla import vmap
from jax_flashmla._xla.operation import Operation
from jax_flashmla.reference.prefill import sparse_prefill as reference

if TYPE_CHECKING:
    from jax.typing import DTypeLike


def sparse_prefill(
    q: jax.Array,
    kv: jax.Array,
    indices: jax.Array,
    *,
    d_v: int = 512,
    sm_scale: float | None = None,
    topk_length: jax.Array | None = None,
    attn_sink: jax.Array | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Attention of each query token to the rows of kv that its indices name.

    `out = softmax(sm_scale * q . keys) . values` with float32 accumulation. A row of kv is a key,
    and its first d_v columns are the value; all heads read the same rows. A row named twice counts
    twice. The same inputs give the same bits on the same device. Rows in a paged cache go to
    `sparse_decode`.

    Args:
        q: [s_q, h_q, d_qk] bfloat16, float16 or float32; s_q * h_q below 2^31.
        kv: [s_kv, 1, d_qk] in q's dtype.
        indices: [s_q, topk] int32 rows of kv. One outside [0, s_kv) is not attended and never
            read.
        d_v: columns of a value, at most d_qk.
        sm_scale: scale of the scores, finite and positive; by default d_qk ** -0.5.
        topk_length: [s_q] int32, how many of a query token's leftmost indices count, clamped to
            [0, topk]; what follows may be anything. By default all.
        attn_sink: [h_q] float32, natural log: out is multiplied by
            `exp(lse) / (exp(lse) + exp(attn_sink))`, lse is not. -inf is no sink, which is the
            default; inf makes out 0.
        implementation: None for the platform's best, "kernel" to insist on the handler, "xla" for
            pure JAX, which can be differentiated.

    Returns:
        out: [s_q, h_q, d_v] in q's dtype, 0 in a row with nothing to attend.
        lse: [s_q, h_q] float32, natural log; -inf in a row with nothing to attend.
        max_logits: [s_q, h_q] float32, the largest of the scaled scores; -inf in a row with
            nothing to attend.

    Raises:
        TypeError, ValueError: an argument is not as described.
        NotImplementedError: implementation is "kernel" and there is none for this platform, device
            or these dimensions; or the kernel is differentiated.
    """
    s_q, h_q, d_qk = _checks.check_array("q", q, "[s_q, h_q, d_qk]", _checks.CACHE_DTYPES)
    if s_q * h_q > _limits.INT32_MAX:
        raise ValueError(
            f"q must have less than 2^31 rows s_q * h_q, got {s_q} * {h_q} = {s_q * h_q}"
        )
    s_kv, h_kv, width = _checks.check_array("kv", kv, "[s_kv, 1, d_qk]", _checks.CACHE_DTYPES)
    if kv.dtype != q.dtype:
        raise TypeError(f"kv must have q's dtype {q.dtype}, got {kv.dtype}")
    if (h_kv, width) != (1, d_qk):
        raise ValueError(f"kv must be [s_kv, 1, d_qk] with q's d_qk = {d_qk}, got shape {kv.shape}")
    if s_kv > _limits.INT32_MAX:
        raise ValueError(f"kv must have at most 2^31 - 1 rows, got {s_kv}")
    indices = _checks.as_int32("indices", indices, "[s_q, topk]")
    if indices.shape[0] != s_q:
        raise ValueError(
            f"indices must be [s_q, topk] with q's s_q = {s_q}, got shape {indices.shape}"
        )
    if topk_length is None:
        topk_length = jnp.full(s_q, indices.shape[1], jnp.int32)
    else:
        topk_length = _checks.as_int32("topk_length", topk_length, "[s_q]")
        if topk_length.shape != (s_q,):
            raise ValueError(
                f"topk_length must have one entry per query token, s_q = {s_q}, got shape "
                f"{topk_length.shape}"
            )
    d_v = _checks.check_int("d_v", d_v, 1, _limits.INT32_MAX)
    if d_v > d_qk:
        raise ValueError(
            f"d_v must be at most d_qk = {d_qk} (a value is a row's first d_v columns), got {d_v}"
        )
    if sm_scale is not None:
        _checks.check_number("sm_scale", sm_scale)
    _checks.check_implementation(implementation)
    out, lse, max_logits = prefill_op(
        q,
        kv,
        indices,
        topk_length,
        _checks.as_sink(attn_sink, h_q),
        d_v=d_v,
        sm_scale=float(d_qk**-0.5 if sm_scale is None else sm_scale),
        implementation=implementation,
    )
    return out, lse, max_logits


def sm90_refusal(dtype: DTypeLike, d_qk: int, d_v: int) -> str | None:
    """Why the Hopper kernel does not take a call; None where it does."""
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"the sm90 kernel of sparse_prefill takes bfloat16 and float16, got {dtype}"
    if d_qk not in (512, 576) or d_v != 512:
        return (
            "the sm90 kernel of sparse_prefill takes d_qk = 512 or 576 and d_v = 512, got "
            f"d_qk = {d_qk} and d_v = {d_v}"
        )
    return None


def _refusal(q: Any, *_: Any, d_v: int, **__: Any) -> str | None:
    return sm90_refusal(q.dtype, q.shape[-1], d_v)


def _results(q: Any, *_: Any, d_v: int, **__: Any) -> list[tuple[tuple[int, ...], Any]]:
    rows = q.shape[:2]
    return [((*rows, d_v), q.dtype), (rows, jnp.float32), (rows, jnp.float32)]


def _batch(
    operands: tuple[jax.Array, ...], dims: vmap.Dims, **params: Any
) -> tuple[list[jax.Array], list[int]]:
    n = vmap.mapped_size(operands, dims)
    q, kv, indices, lengths, attn_sink = operands
    (s_q, h_q, _), (s_kv, *_) = vmap.shape_of_one(q, dims[0]), vmap.shape_of_one(kv, dims[1])
    rows_fit = n * s_q * h_q <= _limits.INT32_MAX
    folds = rows_fit and (dims[1] is None or n * s_kv <= _limits.INT32_MAX)
    if not folds or dims[4] is not None:
        return vmap.call_each(lambda *x: prefill_op.bind(*x, **params), operands, dims), [0] * 3
    q, indices, lengths = (
        vmap.fold(x, d, n) for x, d in ((q, dims[0]), (indices, dims[2]), (lengths, dims[3]))
    )
    if dims[1] is not None:  # rows of all arrays end to end
        inside = (indices >= 0) & (indices < s_kv)
        first = jnp.repeat(jnp.arange(n, dtype=jnp.int32) * s_kv, indices.shape[0] // n)
        indices = jnp.where(inside, indices + first[:, None], -1)
        kv = vmap.fold(kv, dims[1], n)
    results = prefill_op.bind(q, kv, indices, lengths, attn_sink, **params)
    return [vmap.unfold(x, n) for x in results], [0] * 3


def _attributes(*, sm_scale: float, **_: Any) -> dict[str, Any]:
    return {"sm_scale": np.float32(sm_scale)}


prefill_op = Operation(
    "sparse_prefill",
    static=("d_v", "sm_scale"),
    results=_results,
    num_results=3,
    reference=reference,
    batch=_batch,
    attributes=_attributes,
    refusal=_refusal,
)
