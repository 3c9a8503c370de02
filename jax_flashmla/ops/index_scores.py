"""Scores of the cached tokens by an indexer, of which sparse attention attends the best."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_flashmla import _checks
from jax_flashmla._context import as_context
from jax_flashmla._index_source import as_index_layer, as_index_table, check_queries
from jax_flashmla._xla import vmap
from jax_flashmla._xla.operation import Operation
from jax_flashmla.cache.format import INDEX_BLOCK_SIZE, CacheFormat
from jax_flashmla.ops.make_schedule import SplitSchedule, check_schedule, make_schedule
from jax_flashmla.reference.indexer import Keys
from jax_flashmla.reference.indexer import index_scores as reference

if TYPE_CHECKING:
    from jax.typing import ArrayLike


def index_scores(
    q: jax.Array,
    weights: jax.Array,
    blocks: jax.Array,
    block_table: jax.Array,
    cache_seqlens: jax.Array,
    *,
    format: CacheFormat,
    causal: bool = True,
    first_block: ArrayLike = 0,
    layer_blocks: int | None = None,
    context: tuple[ArrayLike, int] | None = None,
    schedule: SplitSchedule | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """An indexer's score of each cached token for each query token.

    `score = scale * sum over heads of weight * relu(q . codes)`, the codes and the scale of the
    token's cached key, with float32 accumulation. A NaN in any of these makes it NaN. The same
    inputs give the same bits on the same device.

    Args:
        q: [b, s_q, heads, 128] float8_e4m3fn or bfloat16; at most 64 heads, b * s_q * heads below
            2^31.
        weights: [b, s_q, heads] float32, of each head, with all scales but the keys': those of fp8
            queries, heads ** -0.5, 128 ** -0.5.
        blocks: [num_blocks, 64 * 132] uint8, keys in the format.
        block_table: [b, max_blocks] int32 block ids, counted from the layer's first block. Tokens
            of a block outside the layer are not visible.
        cache_seqlens: [b] int32, tokens in each sequence's cache, clamped to the table's room.
        format: CacheFormat(name="fp8_index").
        causal: whether query token j of s_q sees only tokens up to cache_seqlens - s_q + j; else
            all.
        first_block: the layer's first block in the array, where several layers share it; a Python
            int, or a traced integer, which is clamped to the array.
        layer_blocks: blocks of the layer, by default all of the array. layer_blocks * 64 is at most
            2^31 - 1.
        context: (rank, size) as in `dense_decode`: scores are then by local token.
        schedule: from `make_schedule` for these sequences; made here by default, with a part for
            each multiprocessor.
        implementation: None for the platform's best, "kernel" to insist on the handler, "xla" for
            pure JAX, which can be differentiated.

    Returns:
        scores: [b, s_q, max_blocks * 64] float32 by token position, -inf where not visible.

    Raises:
        TypeError, ValueError: an argument is not as described.
        NotImplementedError: implementation is "kernel" and there is none for this platform or
            device; or the kernel is differentiated.
    """
    b, s_q, _ = check_queries(q, weights)
    layer = as_index_layer(blocks, format, first_block, layer_blocks)
    block_table, cache_seqlens = as_index_table(block_table, cache_seqlens, b, "q")
    _checks.check_bool("causal", causal)
    _checks.check_implementation(implementation)
    seen, here = None, as_context(context)
    if here is not None:
        lengths = here.clamp(cache_seqlens, block_table.shape[1] * INDEX_BLOCK_SIZE)
        cache_seqlens = here.count(lengths)
        seen = here.seen(lengths, s_q) if causal and s_q > 1 else None
        causal = False
    (scores,) = scores_op(
        q,
        weights,
        layer.blocks,
        block_table,
        cache_seqlens,
        layer.first_block,
        index_cuts(cache_seqlens, schedule, implementation),
        layer_blocks=layer.layer_blocks,
        causal=bool(causal),
        implementation=implementation,
    )
    if seen is not None:
        token = jnp.arange(scores.shape[2], dtype=jnp.int32)
        scores = jnp.where(token[None, None, :] < seen[:, :, None], scores, -jnp.inf)
    return scores


def index_cuts(
    cache_seqlens: jax.Array, schedule: SplitSchedule | None, implementation: str | None
) -> jax.Array:
    """[num_parts + 1, 2]; a part for each multiprocessor by default."""
    if schedule is None:
        return make_schedule(cache_seqlens, h_q=1, implementation=implementation).cuts
    return check_schedule(schedule, cache_seqlens.shape[0]).cuts


def _results(
    q: Any, weights: Any, blocks: Any, block_table: Any, *_: Any, **__: Any
) -> list[tuple[tuple[int, ...], Any]]:
    b, s_q = q.shape[:2]
    return [((b, s_q, block_table.shape[1] * INDEX_BLOCK_SIZE), jnp.float32)]


def _reference(*operands: jax.Array, layer_blocks: int, causal: bool) -> list[jax.Array]:
    q, weights, blocks, table, lengths, first, _ = operands  # cuts change nothing
    keys = Keys(blocks, table, lengths, first, layer_blocks)
    return [reference(q, weights, keys, causal=causal)]


def _batch(
    operands: tuple[jax.Array, ...],
    dims: vmap.Dims,
    *,
    layer_blocks: int,
    implementation: str | None,
    **params: Any,
) -> tuple[list[jax.Array], list[int | None]]:
    params["implementation"] = implementation
    n = vmap.mapped_size(operands, dims)
    if all(d is None for d in dims[:-1]):  # no schedule changes what is computed
        assert dims[-1] is not None
        cuts = jax.lax.index_in_dim(operands[-1], 0, dims[-1], keepdims=False)
        return scores_op.bind(*operands[:-1], cuts, layer_blocks=layer_blocks, **params), [None]
    q, weights, blocks, table, lengths, first, _ = operands
    q, weights, lengths = (
        vmap.fold(x, dims[i], n) for i, x in ((0, q), (1, weights), (4, lengths))
    )
    vmap.check_folded("index_scores", n, q.shape[0] // n)
    (blocks, table, first), layer_blocks = vmap.fold_layer(
        n, (blocks, table, first), (*dims[2:4], dims[5]), INDEX_BLOCK_SIZE, layer_blocks
    )
    cuts = index_cuts(lengths, None, implementation)
    (scores,) = scores_op.bind(
        q, weights, blocks, table, lengths, first, cuts, layer_blocks=layer_blocks, **params
    )
    return [vmap.unfold(scores, n)], [0]


def _attributes(*, layer_blocks: int, causal: bool, **_: Any) -> dict[str, Any]:
    return {"causal": causal, "layer_blocks": np.int32(layer_blocks)}


scores_op = Operation(
    "index_scores",
    static=("layer_blocks", "causal"),
    results=_results,
    num_results=1,
    reference=_reference,
    batch=_batch,
    attributes=_attributes,
    chained=True,
)
