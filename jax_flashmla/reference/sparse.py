"""sparse_decode in pure JAX: the rows that indices name, then two products."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from jax_flashmla.cache.format import CacheFormat
from jax_flashmla.reference.rows import take_rows

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Float32, Int32, Num

_CHUNK_BYTES = 2**28  # of gathered rows in float32: more query tokens are taken in turns


class Source(NamedTuple):
    """A paged cache, what each query token attends in it, and how it is stored."""

    blocks: Num[Array, "num_blocks ..."]
    indices: Int32[Array, "b s_q topk"]
    topk_length: Int32[Array, "b s_q"]
    first_block: Int32[Array, ""]
    format: CacheFormat
    layer_blocks: int


def sparse_decode(
    q: Float[Array, "b s_q h_q d_qk"],
    sources: Sequence[Source],
    attn_sink: Float32[Array, "h_q"],
    kv_scale: Float32[Array, ""],
    *,
    d_v: int,
    sm_scale: float,
) -> tuple[Float[Array, "b s_q h_q {d_v}"], Float32[Array, "b s_q h_q"]]:
    b, s_q, h_q, d_qk = q.shape

    def attend_query(inputs: tuple) -> tuple[Array, ...]:
        query, picks = inputs
        gathered = [
            _gather(source, indices, length, kv_scale)
            for source, (indices, length) in zip(sources, picks, strict=True)
        ]
        keys, keep = (jnp.concatenate(x) for x in zip(*gathered, strict=True))
        return attend(query, keys, keep, attn_sink, d_v, sm_scale)[:2]

    n = b * s_q
    picks = [(source.indices.reshape(n, -1), source.topk_length.reshape(n)) for source in sources]
    inputs = (q.reshape(n, h_q, d_qk), picks)
    topk = sum(source.indices.shape[-1] for source in sources)
    out, lse = map_queries(attend_query, inputs, n, row_bytes=4 * topk * d_qk)
    return out.reshape(b, s_q, h_q, d_v), lse.reshape(b, s_q, h_q)


def map_queries(
    attend_query: Callable[[tuple], tuple[Array, ...]], inputs: tuple, n: int, row_bytes: int
) -> tuple[Array, ...]:
    """`attend_query` of each of n query tokens, each of which gathers row_bytes."""
    chunk = max(1, _CHUNK_BYTES // row_bytes)
    if n <= chunk:
        return jax.vmap(attend_query)(inputs)
    # A derivative gathers the rows again, rather than keep them all.
    return jax.lax.map(jax.checkpoint(attend_query), inputs, batch_size=chunk)


def _gather(
    source: Source,
    indices: Int32[Array, "topk"],
    topk_length: Int32[Array, ""],
    kv_scale: Float32[Array, ""],
) -> tuple[Float[Array, "topk d_qk"], Bool[Array, "topk"]]:
    """Rows, zeros where not attended; and which are."""
    block_size = source.format.block_size
    topk = indices.shape[0]
    keep = (indices >= 0) & (indices < source.layer_blocks * block_size)
    keep &= jnp.arange(topk, dtype=jnp.int32) < topk_length
    slot = jnp.where(keep, indices, 0)
    first = jnp.clip(source.first_block, 0, source.blocks.shape[0] - source.layer_blocks)
    block, offset = first + slot // block_size, slot % block_size
    rows = take_rows(source.format, source.blocks, block, offset, kv_scale)[:, 0]
    return jnp.where(keep[:, None], rows, jnp.zeros((), rows.dtype)), keep


def attend(
    q: Float[Array, "h_q d_qk"],
    keys: Float[Array, "tokens d_qk"],
    keep: Bool[Array, "tokens"],
    attn_sink: Float32[Array, "h_q"],
    d_v: int,
    sm_scale: float,
) -> tuple[Float[Array, "h_q {d_v}"], Float32[Array, "h_q"], Float32[Array, "h_q"]]:
    """One query token's out, lse and largest scaled scores."""
    scores = jnp.einsum(
        "hd,td->ht",
        q.astype(keys.dtype),
        keys,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    scores = jnp.where(keep[None, :], scores * sm_scale, -jnp.inf)

    # A row with nothing to attend has top = -inf and total = 0.
    top = jax.lax.stop_gradient(jnp.max(scores, axis=-1))
    base = jnp.where(top == -jnp.inf, 0.0, top)
    weights = jnp.exp(scores - base[:, None])
    total = jnp.sum(weights, axis=-1)
    empty = total == 0
    total = jnp.where(empty, 1.0, total)
    lse = jnp.where(empty, -jnp.inf, top + jnp.log(total))
    with_sink = total + jnp.where(empty, 0.0, jnp.exp(attn_sink - base))
    out = jnp.einsum(
        "ht,td->hd",
        weights / with_sink[:, None],
        keys[:, :d_v].astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )
    return out.astype(q.dtype), lse, top
