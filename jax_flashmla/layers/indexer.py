"""The indexer: index queries and keys of new tokens, and the selection of what they attend to."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from jax_flashmla import PagedCache, Slots, _checks, context, index_append, index_topk
from jax_flashmla.layers.config import IndexerConfig, MLAConfig
from jax_flashmla.layers.params import MLAParams
from jax_flashmla.layers.project import check_call, positions_of, query_inputs, roll_tokens
from jax_flashmla.layers.rope import cos_and_sin
from jax_flashmla.layers.step import Projected, multiply, replace_layer
from jax_flashmla.reference.index_append import layer_norm, quantise_queries, turn


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Selection:
    """The tokens that each of a step's tokens attends to, the same in every layer of the cache.

    Attributes:
        slots: [b, s, topk] int32, by the cache's block table, first those that there are, then -1;
            or None: all tokens up to itself.
        lengths: how many there are at most [b, s] int32; None with slots None.
    """

    slots: jax.Array | None
    lengths: jax.Array | None


ALL = Selection(None, None)


def select(
    config: MLAConfig,
    params: MLAParams,
    x: jax.Array,
    cache: PagedCache,
    *,
    slots: Slots,
    layer: int | jax.Array | None = None,
    prefix: bool = True,
    heads_axis: str | None = None,
    context_axis: str | None = None,
    implementation: str | None = None,
) -> tuple[PagedCache, Selection]:
    """Writes the new tokens' index keys, and selects the tokens that they attend to.

    `decode` and `prefill` do it themselves where every layer has an indexer. Under IndexShare, call
    it in a layer that has one, and hand the selection to that layer and to those after it.

    Where the shapes say that no token can see more than topk, the selection is of all tokens, and
    attention is dense. Else the `min(topk, visible)` best are selected, which are all of them as
    long as a sequence is short.

    Args:
        config: the layer, with an indexer.
        params: its parameters.
        x: the new tokens [b, s, hidden_size], as for `decode`.
        cache: the cache, after the step's `advance(s)`. Without an index pool nothing is written,
            and all tokens are selected. The pool's format is that of `config.index_format`.
        slots: what `advance` gave.
        layer: which layer of the index pool (`config.indexer.index_layer`); may be traced. May be
            left out if there is one.
        prefix: as for `prefill`.
        heads_axis: inside `jax.shard_map`, the mesh axis that splits heads. Each of its devices
            selects for itself: the same tokens, as the indexer's heads are not split.
        context_axis: as for `decode`. Each device's slots are those that it has of the selected
            tokens.
        implementation: as for `index_topk`.

    Returns:
        cache: with the new index keys.
        selection: of each new token; of padding, any.

    Raises:
        TypeError, ValueError: an argument is not as described.
    """
    check_call(config, params, x, cache, slots, heads_axis, context_axis)
    return select_projected(
        None, config, params, x, cache, slots, layer, context_axis, implementation, prefix=prefix
    )


def select_projected(
    down: Projected | None,
    config: MLAConfig,
    params: MLAParams,
    x: jax.Array,
    cache: PagedCache,
    slots: Slots,
    layer: int | jax.Array | None,
    context_axis: str | None,
    implementation: str | None,
    *,
    prefix: bool,
) -> tuple[PagedCache, Selection]:
    """As `select`, past its checks, where `down` may have x's projections already."""
    indexer = config.indexer
    if indexer is None:
        raise ValueError("config must have an indexer to select tokens, got None")
    if cache.index_blocks is None:
        return cache, ALL
    _check_pool(indexer, cache)
    x = jnp.asarray(x)
    longest = cache.table.max_seqlen
    if context_axis is not None:
        longest *= _checks.axis_size("context_axis", context_axis)
    longest = longest if prefix else min(longest, slots.s_new)
    inputs = keys = weights = q = None
    if down is not None:
        inputs, keys = down.inputs, down.index_key
        weights, q = down.index_weights, down.index_q
    if keys is None:
        keys = jnp.einsum("bsi,id->bsd", x, params.index_w_k.astype(x.dtype))
    if longest > indexer.topk and q is None:
        inputs = query_inputs(config, params, x) if inputs is None else inputs
        q, _ = multiply(inputs, params.index_w_q, implementation=implementation)
    if longest > indexer.topk and weights is None:
        weights = _weigh_heads(params, x)
    cache, q, weights = _append(
        config, indexer, params, cache, slots, layer, keys, q, weights, implementation
    )
    if q is None or weights is None:
        return cache, ALL

    # The last query is a sequence's last token: move the padding to the front.
    padding = slots.s_new - slots.num_new
    q, weights = roll_tokens(q, padding), roll_tokens(weights, padding)
    best = _select_best(indexer, q, weights, cache, layer, context_axis, implementation)
    best = roll_tokens(best, -padding)
    if context_axis is not None:
        return cache, Selection(best, jnp.sum(best >= 0, axis=2, dtype=jnp.int32))
    return cache, Selection(best, jnp.minimum(positions_of(slots) + 1, indexer.topk))


def selection_for(
    selection: Selection | None,
    config: MLAConfig,
    params: MLAParams,
    x: jax.Array,
    cache: PagedCache,
    slots: Slots,
    layer: int | jax.Array | None,
    heads_axis: str | None,
    context_axis: str | None,
    implementation: str | None,
    *,
    prefix: bool = True,
    down: Projected | None = None,
) -> tuple[PagedCache, Selection]:
    """What a layer attends to: the selection that it is given, or its own."""
    if selection is not None:
        if not isinstance(selection, Selection):
            raise TypeError(
                f"selection must be a Selection or None, got {type(selection).__name__}"
            )
        for name, rank, dims in (("slots", 3, "[b, s, topk]"), ("lengths", 2, "[b, s]")):
            if (given := getattr(selection, name)) is not None:
                _checks.refuse_foreign(f"selection.{name}", given, dims)
                if given.ndim != rank or given.shape[:2] != x.shape[:2]:
                    raise ValueError(
                        f"selection must be of x's b, s = {x.shape[:2]}, {name} {dims}, got "
                        f"{name} of shape {given.shape}"
                    )
        return cache, selection
    if cache.index_blocks is None:
        return cache, ALL
    if config.indexer is None:
        raise ValueError(
            "selection must be given where the cache has an index pool and the layer no indexer: "
            "that of the last layer with one, from select(); got None"
        )
    if cache.index_layers != cache.layers:
        raise ValueError(
            "selection must be given, from select(), where the index pool does not have the "
            f"cache's {cache.layers} layers but {cache.index_layers}, got None"
        )
    check_call(config, params, x, cache, slots, heads_axis, context_axis)
    return select_projected(
        down, config, params, x, cache, slots, layer, context_axis, implementation, prefix=prefix
    )


def _check_pool(indexer: IndexerConfig, cache: PagedCache) -> None:
    """The cache's index pool is of a format that the indexer writes."""
    assert cache.index_format is not None
    format, width = cache.index_format, indexer.head_dim
    if format.name not in ("dense", "fp8_index") or format.d_qk != width or format.h_kv != 1:
        raise ValueError(
            f'cache must have an index pool of format "fp8_index" or "dense" with indexer.head_dim '
            f"= {width} columns and h_kv = 1, got {format}"
        )
    if format.block_size != 64:
        raise ValueError(
            f"cache must have blocks of 64 tokens to select from, got {format.block_size}"
        )


def _append(
    config: MLAConfig,
    indexer: IndexerConfig,
    params: MLAParams,
    cache: PagedCache,
    slots: Slots,
    layer: int | jax.Array | None,
    keys: jax.Array,
    q: jax.Array | None,
    weights: jax.Array | None,
    implementation: str | None,
) -> tuple[PagedCache, jax.Array | None, jax.Array | None]:
    """The cache with index keys, and queries and weights as `_select_best` takes them.

    keys [b, s, at least head_dim] end in the keys before their norm; q [b, s, heads, head_dim] are
    not rotated yet, weights [b, s, heads] without the scale of the scores.
    """
    format, cos, sin, layout = cache.index_format, None, None, "none"
    assert format is not None
    if config.rope.layout != "none":
        cos, sin = cos_and_sin(config, positions_of(slots))
        layout = indexer.rope_layout  # of the first columns, where attention's are the last
    norm, bias = params.index_k_norm, params.index_k_bias.astype(params.index_k_norm.dtype)
    score_scale = (indexer.num_heads * indexer.head_dim) ** -0.5
    if format.name == "fp8_index" and slots.share is None:
        view = cache.index_layer(layer)
        blocks, q, weights = index_append(
            view.blocks,
            keys,
            norm,
            bias,
            cos,
            sin,
            view.block_table,
            slots.positions,
            format=format,
            layout=layout,
            q=q,
            weights=weights,
            weight_scale=score_scale,
            eps=indexer.norm_eps,
            hadamard=indexer.hadamard,
            num_new=slots.num_new,
            implementation=implementation,
        )
        assert cache.index_blocks is not None
        updated = replace_layer(cache.index_blocks, layer, blocks)
        return dataclasses.replace(cache, index_blocks=updated), q, weights

    # Some of the rows are other devices', or keys are stored as they are.
    dense = format.name == "dense"
    if cos is not None and sin is not None:
        cos, sin = cos[:, :, None], sin[:, :, None]
    finish = functools.partial(
        turn, cos=cos, sin=sin, layout=layout, hadamard=indexer.hadamard and not dense
    )
    keys = layer_norm(keys[..., -indexer.head_dim :], norm, bias, indexer.norm_eps)
    keys = finish(keys[:, :, None])
    keys = keys.astype(format.dtype) if dense else keys
    cache = cache.write_index(keys, slots, layer=layer, implementation=implementation)
    if q is None or weights is None:
        return cache, None, None
    q, weights = finish(q), weights * np.float32(score_scale)
    if dense:
        return cache, q, weights
    codes, scales = quantise_queries(format, q)
    return cache, codes, weights * scales


def _select_best(
    indexer: IndexerConfig,
    q: jax.Array,
    weights: jax.Array,
    cache: PagedCache,
    layer: int | jax.Array | None,
    context_axis: str | None,
    implementation: str | None,
) -> jax.Array:
    """Slots [b, s, topk] for index queries [b, s, heads, head_dim] at the sequences' ends.

    They are as `index_topk` takes them; for a dense pool not quantised.
    """
    pool = cache.index_layer(layer)
    table, lengths = cache.table.block_table, cache.table.cache_seqlens
    topk = index_topk
    if context_axis is not None:
        topk = functools.partial(context.index_topk, axis=context_axis)
    if pool.format.name == "dense":
        best = topk(
            None,
            None,
            None,
            table,
            lengths,
            format=None,
            topk=indexer.topk,
            scores=_score_unquantised(q, weights, pool.blocks, pool.block_table),
            layer_blocks=pool.num_blocks,
            implementation=implementation,
        )
        assert isinstance(best, jax.Array)
        return best
    best = topk(
        q,
        weights,
        pool.blocks,
        table,
        lengths,
        format=pool.format,
        topk=indexer.topk,
        first_block=pool.first_block,
        layer_blocks=pool.num_blocks,
        implementation=implementation,
    )
    assert isinstance(best, jax.Array)
    return best


def _weigh_heads(params: MLAParams, x: jax.Array) -> jax.Array:
    """Each head's weight [b, s, heads] float32, not yet with the scale of the scores."""
    # GPUs would multiply float32 in fewer bits otherwise, and select other tokens.
    return jnp.einsum(
        "bsi,ih->bsh",
        x.astype(jnp.float32),
        params.index_w_weights.astype(jnp.float32),
        precision="highest",
    )


def _score_unquantised(
    q: jax.Array, weights: jax.Array, blocks: jax.Array, block_table: jax.Array
) -> jax.Array:
    """Scores [b, s, tokens] float32 of keys as they are; of tokens that are not there, any."""
    gathered = blocks[jnp.maximum(block_table, 0)]  # [b, max_blocks, 64, 1, head_dim]
    k = gathered.reshape(len(gathered), -1, gathered.shape[-1]).astype(jnp.float32)
    products = jnp.einsum("bshd,btd->bsht", q.astype(jnp.float32), k, precision="highest")
    return jnp.einsum("bsh,bsht->bst", weights, jax.nn.relu(products), precision="highest")
