"""sparse_prefill in pure JAX: the rows that indices name, then two products."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax.numpy as jnp

from jax_flashmla.reference.sparse import attend, map_queries

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Float32, Int32


def sparse_prefill(
    q: Float[Array, "s_q h_q d_qk"],
    kv: Float[Array, "s_kv 1 d_qk"],
    indices: Int32[Array, "s_q topk"],
    topk_length: Int32[Array, "s_q"],
    attn_sink: Float32[Array, "h_q"],
    *,
    d_v: int,
    sm_scale: float,
) -> tuple[Float[Array, "s_q h_q {d_v}"], Float32[Array, "s_q h_q"], Float32[Array, "s_q h_q"]]:
    s_q, topk = indices.shape

    def attend_query(inputs: tuple) -> tuple[Array, ...]:
        query, index, length = inputs
        keep = (index >= 0) & (index < kv.shape[0])
        keep &= jnp.arange(topk, dtype=jnp.int32) < length
        rows = kv[jnp.where(keep, index, 0), 0]
        rows = jnp.where(keep[:, None], rows, jnp.zeros((), rows.dtype))
        return attend(query, rows, keep, attn_sink, d_v, sm_scale)

    row_bytes = 4 * topk * q.shape[-1]
    out, lse, max_logits = map_queries(attend_query, (q, indices, topk_length), s_q, row_bytes)
    return out, lse, max_logits
