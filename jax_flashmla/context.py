"""Context parallelism: the tokens of every sequence shared out over the devices of a mesh axis.

Token t is on rank t mod n of the axis, as that rank's local token t // n. Lengths are of whole
sequences; block tables and slots are each rank's own. What is here is called inside `jax.shard_map`
over the axis, and gives each rank the result over all tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_flashmla import _checks, _limits
from jax_flashmla._context import context_of
from jax_flashmla._index_source import check_source
from jax_flashmla.cache.context_allocator import ContextAllocator
from jax_flashmla.cache.format import CacheFormat
from jax_flashmla.ops import dense_decode as _dense
from jax_flashmla.ops import index_topk as _topk
from jax_flashmla.ops import sparse_decode as _sparse
from jax_flashmla.ops.all_reduce_sum import all_reduce_sum
from jax_flashmla.ops.exchange import exchange, exchange_refusal
from jax_flashmla.ops.merge import merge_lse
from jax_flashmla.peers import Peers
from jax_flashmla.reference.indexer import slots_of

if TYPE_CHECKING:
    from jax.typing import ArrayLike


__all__ = ["ContextAllocator", "dense_decode", "index_topk", "merge_over", "sparse_decode"]


def dense_decode(
    q: jax.Array,
    blocks: jax.Array,
    block_table: jax.Array,
    cache_seqlens: jax.Array,
    *,
    axis: str,
    heads_split: bool = False,
    peers: Peers | None = None,
    **options: Any,
) -> tuple[jax.Array, jax.Array]:
    """`jax_flashmla.dense_decode` over the tokens of all ranks.

    Args:
        q: as for `dense_decode`, the same on each rank; packed with cu_q_lens too.
        blocks, block_table: the rank's own.
        cache_seqlens: [b] int32, of whole sequences.
        axis: the mesh axis that shares out the tokens.
        heads_split: q has this rank's share of the heads, in the order of ranks, and so have the
            results. It is gathered, and results are exchanged, which moves less than summing them.
        peers: from `connect_peers(mesh, axis)`: what is small is then exchanged over peer memory,
            in one kernel before attention (with heads_split) and one behind it.
        **options: as for `dense_decode`, except `context`; a schedule is made with context.

    Returns:
        out, lse: as `dense_decode`'s.

    Raises:
        TypeError, ValueError, NotImplementedError: as `dense_decode`.
    """
    size = _checks.axis_size("axis", axis)
    if "context" in options:
        raise TypeError("context must be left out: axis says it")
    if heads_split:
        q = _gather_heads(q, axis, peers)
    context = (jax.lax.axis_index(axis), size)
    out, lse = _dense.dense_decode(
        q, blocks, block_table, cache_seqlens, context=context, **options
    )
    return merge_over(out, lse, axis=axis, heads_split=heads_split, peers=peers)


def sparse_decode(
    q: jax.Array,
    blocks: jax.Array,
    indices: jax.Array,
    *,
    axis: str,
    heads_split: bool = False,
    peers: Peers | None = None,
    attn_sink: jax.Array | None = None,
    **options: Any,
) -> tuple[jax.Array, jax.Array]:
    """`jax_flashmla.sparse_decode` over what the ranks select together.

    Args:
        q: as for `sparse_decode`, the same on each rank.
        blocks: the rank's own.
        indices: the rank's own slots [b, s_q, topk], as `index_topk` gives them; there may be none.
        axis, heads_split, peers: as for `dense_decode`.
        attn_sink: [h_q] float32, of the heads that q has.
        **options: as for `sparse_decode`.

    Returns:
        out, lse: as `sparse_decode`'s.

    Raises:
        TypeError, ValueError, NotImplementedError: as `sparse_decode`.
    """
    _checks.axis_size("axis", axis)
    if attn_sink is not None:
        attn_sink = _checks.as_sink(attn_sink, q.shape[2])
    if heads_split:
        q = _gather_heads(q, axis, peers)
    out, lse = _sparse.sparse_decode(q, blocks, indices, **options)
    out, lse = merge_over(out, lse, axis=axis, heads_split=heads_split, peers=peers)
    if attn_sink is None:
        return out, lse
    # exp(lse) / (exp(lse) + exp(sink)): once, of all ranks' lse.
    share = jax.nn.sigmoid(jnp.where(lse == -jnp.inf, 0.0, lse) - attn_sink[None, None, :])
    return (out.astype(jnp.float32) * share[..., None]).astype(out.dtype), lse


def merge_over(
    out: jax.Array,
    lse: jax.Array,
    *,
    axis: str,
    heads_split: bool = False,
    peers: Peers | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Merges the ranks' attentions, each over its own tokens, as if over all at once.

    Where one rank alone has tokens to attend, the result is its own, bit for bit.

    Args:
        out: the rank's output [..., h_q, d_v].
        lse: float32, natural log [..., h_q]; -inf where there was nothing to attend.
        axis: the mesh axis of the ranks.
        heads_split: whether each rank gets its share of the heads, in the order of ranks, or all.
        peers: as for `dense_decode`.

    Returns:
        out, lse: of out's dtype, and float32; h_q / n heads with heads_split.

    Raises:
        TypeError, ValueError: an argument is not as described, or the ranks cannot share the heads
            evenly.
    """
    n, heads = _checks.axis_size("axis", axis), lse.ndim - 1
    few = n * (out.size * out.dtype.itemsize + lse.size * 4) <= _limits.MAX_EXCHANGE_BYTES
    if heads_split:
        h_q = lse.shape[heads]
        if h_q % n:
            raise ValueError(f"axis must split h_q = {h_q} evenly, got {axis!r} of {n} ranks")
        parts = [
            jnp.moveaxis(x.reshape(*x.shape[:heads], n, h_q // n, *x.shape[heads + 1 :]), heads, 0)
            for x in (out, lse)
        ]
        if peers is not None and exchange_refusal(peers, axis, parts, gather=False) is None:
            outs, lses = exchange(parts, axis, peers=peers, gather=False)
            return merge_lse(outs, lses)
        if not few:
            return merge_lse(*(jax.lax.all_to_all(x, axis, 0, 0) for x in parts))
        rank = jax.lax.axis_index(axis)  # XLA gathers both arrays in one call, but cannot exchange
        outs, lses = (jax.lax.all_gather(x, axis)[:, rank] for x in parts)
        return merge_lse(outs, lses)
    if peers is not None and exchange_refusal(peers, axis, (out, lse), gather=True) is None:
        outs, lses = exchange((out, lse), axis, peers=peers, gather=True)
        return merge_lse(outs, lses)
    if few or n <= 4:  # from 8 ranks on a sum sends less
        # Known to be the same on all ranks, where JAX keeps account of that.
        mapped = axis in jax.sharding.get_abstract_mesh().manual_axes
        to = "invarying" if mapped else "varying"
        outs, lses = (jax.lax.all_gather(x, axis, to=to) for x in (out, lse))
        return merge_lse(outs, lses)
    lses = _gather(lse, axis, peers)
    top = jax.lax.stop_gradient(jnp.max(lses, axis=0))
    top = jnp.where(top == -jnp.inf, 0.0, top)
    total = jnp.sum(jnp.exp(lses - top[None]), axis=0)
    nothing = total == 0
    whole_lse = jnp.where(nothing, -jnp.inf, top + jnp.log(jnp.where(nothing, 1.0, total)))
    weight = jnp.where(nothing, 0.0, jnp.exp(lse - top) / jnp.where(nothing, 1.0, total))
    part = jnp.where((lse == -jnp.inf)[..., None], 0.0, out.astype(jnp.float32))
    out = all_reduce_sum(part * weight[..., None], axis, peers=peers).astype(out.dtype)
    return out, whole_lse


def index_topk(
    q: jax.Array | None,
    weights: jax.Array | None,
    blocks: jax.Array | None,
    block_table: jax.Array,
    cache_seqlens: jax.Array,
    *,
    axis: str,
    format: CacheFormat | None,
    topk: int,
    causal: bool = True,
    scores: jax.Array | None = None,
    return_positions: bool = False,
    first_block: ArrayLike = 0,
    layer_blocks: int | None = None,
    implementation: str | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Of the topk tokens of all ranks that an indexer scores highest, those that are here.

    All ranks together select what `jax_flashmla.index_topk` would from all tokens in one cache,
    ties included: of equal scores the token that is earlier in the sequence wins.

    Args:
        q, weights: as for `index_topk`, the same on each rank.
        blocks, block_table, first_block, layer_blocks: the rank's own.
        cache_seqlens: [b] int32, of whole sequences.
        axis: the mesh axis that shares out the tokens.
        format, causal, implementation: as for `index_topk`.
        topk: how many of all tokens.
        scores: as for `index_topk`, of the rank's own tokens.
        return_positions: whether to return the tokens' positions in their sequences too.

    Returns:
        indices: [b, s_q, topk] int32, the rank's own slots in ascending order of position, then -1.
        positions: [b, s_q, topk] int32, then -1; with return_positions.

    Raises:
        TypeError, ValueError, NotImplementedError: as `index_topk`.
    """
    topk = _checks.check_int("topk", topk, 1, _limits.MAX_TOPK)
    here = context_of(axis)
    if here is None:
        return _topk.index_topk(
            q, weights, blocks, block_table, cache_seqlens, format=format, topk=topk, causal=causal,
            scores=scores, return_positions=return_positions, first_block=first_block,
            layer_blocks=layer_blocks, implementation=implementation,
        )  # fmt: skip
    _checks.check_bool("causal", causal)
    _checks.check_implementation(implementation)
    source, has_scores = check_source(
        q, weights, blocks, block_table, cache_seqlens, format, scores, first_block, layer_blocks
    )
    _, local, best = _topk.select_here(
        source, here, topk=topk, causal=causal, has_scores=has_scores, implementation=implementation
    )
    position = here.positions(local)
    order = jnp.where(local < 0, _NEVER, _descending(best))
    gathered = (jax.lax.all_gather(x, axis, axis=2, tiled=True) for x in (order, position))
    last_order, last_position = (
        x[:, :, topk - 1 : topk] for x in jax.lax.sort(tuple(gathered), dimension=2, num_keys=2)
    )
    earlier = (order < last_order) | ((order == last_order) & (position <= last_position))
    local = jnp.sort(jnp.where(earlier & (local >= 0), local, _limits.INT32_MAX), axis=2)
    local = jnp.where(local == _limits.INT32_MAX, -1, local)
    indices = slots_of(local, source.block_table)
    return (indices, here.positions(local)) if return_positions else indices


_NEVER = np.int32(_limits.INT32_MAX)  # behind the order of every score


def _descending(scores: jax.Array) -> jax.Array:
    """int32, the less the higher the score; -0.0 as 0.0. Of a NaN, any."""
    bits = jax.lax.bitcast_convert_type(scores, jnp.int32)
    bits = jnp.where(bits == np.iinfo(np.int32).min, 0, bits)
    return ~jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _gather(x: jax.Array, axis: str, peers: Peers | None) -> jax.Array:
    """All ranks' [n, ...], as a sum of what is 0 but in the rank's place: known to be the same."""
    parts = jnp.zeros((jax.lax.axis_size(axis), *x.shape), x.dtype)
    return all_reduce_sum(parts.at[jax.lax.axis_index(axis)].set(x), axis, peers=peers)


def _gather_heads(q: jax.Array, axis: str, peers: Peers | None) -> jax.Array:
    """[..., h_q, d_qk] of all ranks' heads."""
    heads = q.ndim - 2
    if peers is None or exchange_refusal(peers, axis, (q,), gather=True) is not None:
        return jax.lax.all_gather(q, axis, axis=heads, tiled=True)
    (gathered,) = exchange((q,), axis, peers=peers, gather=True)
    gathered = jnp.moveaxis(gathered, 0, heads)
    return gathered.reshape(*q.shape[:heads], -1, q.shape[-1])
