"""Layers whose cache's tokens are shared out over devices, held against one device."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import layer_cases
import sparse_layers
import tolerances
from jax_flashmla import BlockTable, PagedCache
from jax_flashmla.cache.table import Share
from jax_flashmla.context import ContextAllocator
from jax_flashmla.layers import IndexerConfig, MLAConfig, MLAParams, decode, prefill
from layer_cases import V3

pytestmark = pytest.mark.usefixtures("on_cpu")

LAYERS = 2
FULL = dataclasses.replace(
    V3, indexer=IndexerConfig(num_heads=8, topk=8, rope_layout="half", head_dim=16)
)
# A prompt of each sequence, a chunk after it, and two steps: how many tokens, padded to WIDTH.
COUNTS = np.array([(6, 1, 2, 5), (5, 0, 6, 2), (2, 1, 0, 2), (1, 2, 2, 1)], np.int32)
WIDTH = 6
LENGTHS = COUNTS.sum(axis=0)


def share_cache(cache: PagedCache, batches: int, ranks: int) -> PagedCache:
    """An empty cache like one device's, whose every device has as many blocks."""
    tables = []
    for lengths in np.split(LENGTHS, batches):
        allocator = ContextAllocator(ranks, cache.num_blocks, cache.format.block_size)
        seqs = [allocator.allocate(int(n)) for n in lengths]
        tables.append(allocator.block_table(seqs, 4))
    tables = np.concatenate(tables)
    n = batches * ranks
    more = lambda x: jnp.concatenate([x] * n)  # noqa: E731
    return dataclasses.replace(
        cache,
        blocks=more(cache.blocks),
        index_blocks=None if cache.index_blocks is None else more(cache.index_blocks),
        table=BlockTable.create(tables, block_size=cache.format.block_size),
        overflow=jnp.zeros(len(tables), jnp.int32),
    )


def run(
    config: MLAConfig, function: Callable, params: MLAParams, cache: PagedCache, x: jax.Array,
    num_new: jax.Array, heads: str | None = None, context: str | None = None,
) -> tuple[PagedCache, jax.Array]:  # fmt: skip
    cache, slots = cache.advance(x.shape[1], num_new, context_axis=context)
    axes = {"heads_axis": heads, "context_axis": context}
    return function(config, params, x, cache, slots=slots, layer=1, **axes)


run_alone = jax.jit(run, static_argnums=(0, 1))


@pytest.mark.parametrize(
    ("config", "sizes", "heads", "functions"),
    [
        (V3, {"x": 2, "t": 2, "y": 2}, "y", (prefill, prefill, decode, decode)),
        (FULL, {"t": 4}, "t", (decode,) * 4),
    ],
    ids=["three axes", "tokens and heads on one axis, an indexer"],
)
def test_steps_are_those_of_one_device(
    config: MLAConfig, sizes: dict[str, int], heads: str, functions: tuple[Callable, ...]
) -> None:
    n = int(np.prod(list(sizes.values())))
    mesh = jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes),
        devices=jax.devices("cpu")[:n],
    )  # fmt: skip
    batch = "x" if "x" in sizes else None
    params = layer_cases.make_params(config)
    if config.indexer is None:
        one = layer_cases.make_cache(config, list(LENGTHS), layers=LAYERS)
    else:
        one = sparse_layers.make_cache(config, list(LENGTHS), layers=LAYERS)
    many = share_cache(one, sizes.get("x", 1), sizes["t"])
    specs = many.specs(batch=batch, context="t")
    param_specs = MLAParams.specs(config, heads)
    put = lambda tree, specs: jax.tree.map(  # noqa: E731
        lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), tree, specs
    )
    many, sharded = put(many, specs), put(params, param_specs)
    tokens = layer_cases.make_x(config, 4, int(LENGTHS.max()))
    steps = {
        function: jax.jit(
            jax.shard_map(
                functools.partial(run, config, function, heads=heads, context="t"),
                mesh=mesh,
                in_specs=(param_specs, specs, P(batch), P(batch)),
                out_specs=(specs, P(batch)),
            )
        )
        for function in set(functions)
    }
    for function, counts in zip(functions, COUNTS, strict=True):
        at = np.asarray(one.table.cache_seqlens)
        x = np.full((4, WIDTH, config.hidden_size), 7, np.float32)  # padding: finite
        for i, count in enumerate(counts):
            x[i, :count] = tokens[i, at[i] : at[i] + count]
        many, got = steps[function](sharded, many, x, counts)
        one, expected = run_alone(config, function, params, one, x, counts)
        for i, count in enumerate(counts):
            tolerances.assert_close("y", got[i, :count], expected[i, :count], tolerances.F32_LAYER)
    np.testing.assert_array_equal(many.table.cache_seqlens, LENGTHS)
    np.testing.assert_array_equal(many.overflow, 0)
    assert many.check() == []


def test_an_axis_other_than_that_of_the_slots_is_refused() -> None:
    params, cache = layer_cases.make_params(V3), layer_cases.make_cache(V3, [9])
    cache, slots = cache.advance()
    x = jnp.zeros((1, 1, V3.hidden_size))
    share = Share(slots.positions, slots.positions, slots.num_new, 2)
    with pytest.raises(ValueError, match=r"context_axis must be that of .* of 2 ranks, got None"):
        decode(V3, params, x, cache, slots=dataclasses.replace(slots, share=share))
