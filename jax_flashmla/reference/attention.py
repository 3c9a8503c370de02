"""dense_decode in pure JAX: gathered rows, then two products."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from jax_flashmla.cache.format import CacheFormat
from jax_flashmla.reference.gather import gather_rows

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Float32, Int32, Num


def dense_decode(
    q: Float[Array, "b s_q h_q d_qk"],
    blocks: Num[Array, "num_blocks ..."],
    block_table: Int32[Array, "b max_blocks"],
    cache_seqlens: Int32[Array, "b"],
    seen: Int32[Array, "b seen"],
    kv_scale: Float32[Array, ""],
    *,
    format: CacheFormat,
    d_v: int,
    sm_scale: float,
    causal: bool,
) -> tuple[Float[Array, "b s_q h_q {d_v}"], Float32[Array, "b s_q h_q"]]:
    b, s_q, h_q, d_qk = q.shape
    h_kv = format.h_kv
    keys = gather_rows(format, blocks, block_table, cache_seqlens, kv_scale)
    tokens = keys.shape[1]
    scores = jnp.einsum(
        "bihgd,bthd->bhgit",
        q.reshape(b, s_q, h_kv, h_q // h_kv, d_qk).astype(keys.dtype),
        keys,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    # Query i sees keys below seen[b, i]; a causal query ends s_q - 1 - i keys before the last.
    if seen.shape[1] == 1:  # causal tells it
        before_last = (
            jnp.arange(s_q - 1, -1, -1, dtype=jnp.int32) if causal else jnp.zeros(1, jnp.int32)
        )
        seen = jnp.clip(cache_seqlens, 0, tokens)[:, None] - before_last[None, :]
    mask = jnp.arange(tokens, dtype=jnp.int32)[None, None, :] < seen[:, :, None]
    scores = jnp.where(mask[:, None, None], scores * sm_scale, -jnp.inf)

    # A row with nothing to attend has top = -inf and total = 0.
    top = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.exp(scores - jnp.where(top == -jnp.inf, 0.0, top))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    empty = total == 0
    total = jnp.where(empty, 1.0, total)
    lse = jnp.where(empty, -jnp.inf, top + jnp.log(total))  # [b, h_kv, group, s_q, 1]
    out = jnp.einsum(
        "bhgit,bthd->bihgd",
        weights / total,
        keys[..., :d_v].astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )
    lse = jnp.transpose(lse[..., 0], (0, 3, 1, 2))
    return out.reshape(b, s_q, h_q, d_v).astype(q.dtype), lse.reshape(b, s_q, h_q)
