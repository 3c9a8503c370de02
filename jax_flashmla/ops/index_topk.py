"""The tokens that an indexer scores highest: what sparse attention attends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_flashmla import _checks, _limits
from jax_flashmla._context import Context, as_context
from jax_flashmla._index_source import Source, check_source, no_keys
from jax_flashmla._xla import vmap
from jax_flashmla._xla.operation import Operation
from jax_flashmla.cache.format import INDEX_BLOCK_SIZE, CacheFormat
from jax_flashmla.ops.index_scores import index_cuts, scores_op
from jax_flashmla.ops.make_schedule import SplitSchedule, uncut
from jax_flashmla.reference import indexer as reference

if TYPE_CHECKING:
    from jax.typing import ArrayLike


def index_topk(
    q: jax.Array | None,
    weights: jax.Array | None,
    blocks: jax.Array | None,
    block_table: jax.Array,
    cache_seqlens: jax.Array,
    *,
    format: CacheFormat | None,
    topk: int,
    causal: bool = True,
    scores: jax.Array | None = None,
    return_positions: bool = False,
    first_block: ArrayLike = 0,
    layer_blocks: int | None = None,
    context: tuple[ArrayLike, int] | None = None,
    schedule: SplitSchedule | None = None,
    implementation: str | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Slots of the topk cached tokens that an indexer scores highest, for each query token.

    They are those of a stable selection over the scores of `index_scores`, bit for bit: of equal
    scores (-0.0 and 0.0 too) the earlier token wins; -inf and NaN are never selected. Slots are
    `block * 64 + offset` by the table as it is given. `sparse_decode` attends them, in the cache
    that shares the table:

    >>> import jax, jax.numpy as jnp
    >>> from jax_flashmla import BlockTable, CacheFormat, PagedCache, index_topk, sparse_decode
    >>> table = BlockTable.create([[1, 0], [2, -1]])
    >>> cache = PagedCache.create(
    ...     CacheFormat(), table, num_blocks=3, layers=2, index_format=CacheFormat(name="fp8_index")
    ... )
    >>> cache, slots = cache.advance(1)
    >>> cache = cache.write(jnp.ones((2, 1, 1, 576), jnp.bfloat16), slots, layer=1)
    >>> cache = cache.write_index(jnp.ones((2, 1, 1, 128), jnp.bfloat16), slots, layer=1)
    >>> keys, table = cache.index_layer(1), cache.table
    >>> indices = index_topk(
    ...     jnp.ones((2, 1, 32, 128), jnp.bfloat16), jnp.ones((2, 1, 32)), keys.blocks,
    ...     table.block_table, table.cache_seqlens, format=keys.format, topk=3,
    ...     first_block=keys.first_block, layer_blocks=keys.num_blocks,
    ... )
    >>> indices
    Array([[[ 64,  -1,  -1]],
    <BLANKLINE>
           [[128,  -1,  -1]]], dtype=int32)
    >>> rows = cache.layer(1)
    >>> out, lse = sparse_decode(
    ...     jnp.ones((2, 1, 16, 576), jnp.bfloat16), rows.blocks, indices,
    ...     first_block=rows.first_block, layer_blocks=rows.num_blocks,
    ... )

    Args:
        q, weights, blocks, block_table, cache_seqlens, format, causal, first_block, layer_blocks:
            as for `index_scores`.
        topk: how many, 1 to 4096; may be more than are visible.
        scores: [b, s_q, max_blocks * 64] float32, to select from instead of computing them: q,
            weights and blocks are then None, first_block is not used, and format may be None.
            cache_seqlens, causal and layer_blocks (any by default) decide what is visible; scores
            of other tokens may be anything.
        return_positions: whether to return the tokens' positions too.
        context: (rank, size) as in `dense_decode`: the best of the tokens that are here, and
            scores by local token. `jax_flashmla.context.index_topk` selects from those of all
            ranks.
        schedule: from `make_schedule` for these sequences; made here by default, with a part for
            each multiprocessor.
        implementation: None for the platform's best, "kernel" to insist on the handler, "xla" for
            pure JAX.

    Returns:
        indices: [b, s_q, topk] int32, the slots in ascending order of position, then -1.
        positions: [b, s_q, topk] int32, the tokens' positions in their sequences, then -1; with
            return_positions.

    Raises:
        TypeError, ValueError: an argument is not as described.
        NotImplementedError: implementation is "kernel" and there is none for this platform or
            device; or the kernel is differentiated.
    """
    topk = _checks.check_int("topk", topk, 1, _limits.MAX_TOPK)
    _checks.check_bool("causal", causal)
    source, has_scores = check_source(
        q, weights, blocks, block_table, cache_seqlens, format, scores, first_block, layer_blocks
    )
    _checks.check_bool("return_positions", return_positions)
    _checks.check_implementation(implementation)
    here, s_q = as_context(context), (source.scores if has_scores else source.q).shape[1]
    if here is not None and causal and s_q > 1:
        indices, positions, _ = select_here(
            source, here, topk=topk, causal=True, has_scores=has_scores,
            implementation=implementation,
        )  # fmt: skip
    else:
        lengths = source.cache_seqlens
        if here is not None:
            lengths = here.local_lengths(lengths, source.capacity)
        indices, positions = topk_op(
            *source[:5],
            lengths,
            source.first_block,
            index_cuts(lengths, schedule, implementation),
            layer_blocks=source.layer_blocks,
            causal=bool(causal),
            topk=topk,
            has_scores=has_scores,
            implementation=implementation,
        )
    if here is not None:
        positions = here.positions(positions)
    return (indices, positions) if return_positions else indices


_SCORE_BYTES = 2**25  # kIndexTopkScoreBytes in csrc/params/index_topk.h


def workspace_bytes(*, b: int, s_q: int, max_blocks: int) -> int:
    """Of the scores of as many query tokens as are selected for at once.

    index_topk_workspace_bytes in csrc/params/index_topk.h says the same.
    """
    query_bytes = b * max_blocks * INDEX_BLOCK_SIZE * 4
    return min(s_q, max(8, _SCORE_BYTES // query_bytes // 8 * 8)) * query_bytes


def select_here(
    source: Source,
    here: Context,
    *,
    topk: int,
    causal: bool,
    has_scores: bool,
    implementation: str | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The best of a rank's tokens, whatever each query sees of them, with their scores.

    Each query token is selected for as a sequence of its own. Scores are made of so many query
    tokens at a time as fit index_topk's workspace.

    Returns:
        indices, positions, scores: [b, s_q, topk]; positions are local tokens', scores of -1 any.
    """
    b, s_q = (source.scores if has_scores else source.q).shape[:2]
    lengths = here.clamp(source.cache_seqlens, source.capacity)
    seen = here.seen(lengths, s_q)  # [b, s_q]
    if not causal:
        seen = jnp.broadcast_to(seen[:, -1:], seen.shape)
    max_blocks = source.block_table.shape[1]

    def select(inputs: Sequence[jax.Array]) -> Sequence[jax.Array]:
        seen, *given = inputs
        n = b * seen.shape[1]
        if has_scores:
            (scores,) = given
        else:
            longest = seen.max(axis=1)
            cuts = index_cuts(longest, None, implementation)
            (scores,) = scores_op(
                *given, source.blocks, source.block_table, longest, source.first_block, cuts,
                layer_blocks=source.layer_blocks, causal=False, implementation=implementation,
            )  # fmt: skip
        table = jnp.repeat(source.block_table, seen.shape[1], axis=0)
        indices, positions = topk_op(
            *no_keys(),
            scores.reshape(n, 1, -1),
            table,
            seen.reshape(n),
            source.first_block,
            uncut(n, 1),  # not used
            layer_blocks=source.layer_blocks,
            causal=False,
            topk=topk,
            has_scores=True,
            implementation=implementation,
        )
        indices, positions = (x.reshape(*seen.shape, topk) for x in (indices, positions))
        return indices, positions, jnp.take_along_axis(scores, jnp.maximum(positions, 0), axis=2)

    inputs = (seen, source.scores) if has_scores else (seen, source.q, source.weights)
    at_once = workspace_bytes(b=b, s_q=s_q, max_blocks=max_blocks) // (b * source.capacity * 4)
    if has_scores or at_once == s_q:
        indices, positions, scores = select(inputs)
        return indices, positions, scores
    groups = -(-s_q // at_once)

    def split(x: jax.Array) -> jax.Array:  # [groups, b, at_once, ...]
        x = jnp.pad(x, [(0, 0), (0, groups * at_once - s_q), *[(0, 0)] * (x.ndim - 2)])
        return jnp.moveaxis(x.reshape(b, groups, at_once, *x.shape[2:]), 1, 0)

    def join(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x, 0, 1).reshape(b, -1, topk)[:, :s_q]

    indices, positions, scores = map(join, jax.lax.map(select, tuple(map(split, inputs))))
    return indices, positions, scores


def _results(
    *operands: Any, topk: int, has_scores: bool, **_: Any
) -> list[tuple[tuple[int, ...], Any]]:
    q, scores, block_table = operands[0], operands[3], operands[4]
    b, s_q = (scores if has_scores else q).shape[:2]
    size = 1 if has_scores else workspace_bytes(b=b, s_q=s_q, max_blocks=block_table.shape[1])
    slots = ((b, s_q, topk), jnp.int32)
    return [slots, slots, ((size,), jnp.uint8)]


def _reference(
    *operands: jax.Array, layer_blocks: int, causal: bool, topk: int, has_scores: bool
) -> list[jax.Array]:
    q, weights, blocks, scores, table, lengths, first, _ = operands  # cuts change nothing
    if has_scores:
        positions = reference.select_topk(
            scores, table, lengths, topk=topk, layer_blocks=layer_blocks, causal=causal
        )
    else:
        keys = reference.Keys(blocks, table, lengths, first, layer_blocks)
        positions = reference.index_topk(q, weights, keys, topk=topk, causal=causal)
    return [reference.slots_of(positions, table), positions]


def _batch(
    operands: tuple[jax.Array, ...],
    dims: vmap.Dims,
    *,
    layer_blocks: int,
    has_scores: bool,
    implementation: str | None,
    **params: Any,
) -> tuple[list[jax.Array], list[int | None]]:
    params |= {"has_scores": has_scores, "implementation": implementation}
    n = vmap.mapped_size(operands, dims)
    q, weights, blocks, scores, table, lengths, first, cuts = operands
    if all(d is None for d in dims[:-1]):  # no schedule changes what is selected
        assert dims[-1] is not None
        cuts = jax.lax.index_in_dim(cuts, 0, dims[-1], keepdims=False)
        return topk_op.bind(*operands[:-1], cuts, layer_blocks=layer_blocks, **params), [None] * 3
    folded_table = given_table = vmap.fold(table, dims[4], n)
    lengths = vmap.fold(lengths, dims[5], n)
    vmap.check_folded("index_topk", n, lengths.shape[0] // n)
    if has_scores:
        scores = vmap.fold(scores, dims[3], n)
        first = jnp.zeros((), jnp.int32)
    else:
        q, weights = vmap.fold(q, dims[0], n), vmap.fold(weights, dims[1], n)
        (blocks, folded_table, first), layer_blocks = vmap.fold_layer(
            n, (blocks, table, first), (dims[2], dims[4], dims[6]), INDEX_BLOCK_SIZE, layer_blocks
        )
    cuts = index_cuts(lengths, None, implementation)
    _, positions, workspace = topk_op.bind(
        q,
        weights,
        blocks,
        scores,
        folded_table,
        lengths,
        first,
        cuts,
        layer_blocks=layer_blocks,
        **params,
    )
    slots = reference.slots_of(positions, given_table)  # the folded one's ids may be shifted
    return [vmap.unfold(slots, n), vmap.unfold(positions, n), workspace], [0, 0, None]


def _attributes(*, layer_blocks: int, causal: bool, has_scores: bool, **_: Any) -> dict[str, Any]:
    return {"causal": causal, "has_scores": has_scores, "layer_blocks": np.int32(layer_blocks)}


topk_op = Operation(
    "index_topk",
    static=("layer_blocks", "causal", "topk", "has_scores"),
    results=_results,
    num_results=2,
    reference=_reference,
    batch=_batch,
    attributes=_attributes,
    chained=True,
)
