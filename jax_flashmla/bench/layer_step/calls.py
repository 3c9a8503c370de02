"""Builds the layers of a shape, the step that runs them, and their attention kernels alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_flashmla import (
    BlockTable,
    CacheFormat,
    PagedCache,
    SplitSchedule,
    dense_decode,
    index_topk,
    sparse_decode,
)
from jax_flashmla.bench.ahead import Lowered, Programs
from jax_flashmla.bench.layer_step.shapes import INDEX_HEADS, TOPK, WIDTHS, Shape
from jax_flashmla.bench.noise import host_normal, normal
from jax_flashmla.bench.operation import Calls, Timed
from jax_flashmla.bench.pools import random_blocks
from jax_flashmla.bench.setup import Setup
from jax_flashmla.layers import (
    IndexerConfig,
    MLAConfig,
    MLAParams,
    RopeConfig,
    YarnConfig,
    decode,
)

# Of a token's y in the 2-norm, both sides in bfloat16: 4e-3 to 7e-3. With an indexer, up to 20 of
# the 2,048 tokens are others where float32 sums of another order round otherwise, and e4m3 codes
# after them (docs/notebook/decoding_step.md): k of them count with the root of 2 k / 2048.
MAX_RELATIVE_ERROR = 0.25
Blocks = Callable[[CacheFormat, int], jax.Array]  # format, num_blocks -> random blocks
TARGET = "flashmla_chain_v1"
YARN = YarnConfig(factor=40.0, original_max_positions=4096, mscale=1.0, mscale_all_dim=1.0)
INDEXER = IndexerConfig(num_heads=INDEX_HEADS, topk=TOPK, rope_layout="half")


def memory(shape: Shape, setup: Setup) -> int:
    """Bytes of device memory: weights and caches of all layers, and what XLA needs beside."""
    del setup
    return shape.layers * (shape.weight_bytes + shape.cache_bytes) + 2 * shape.weight_bytes


def make_pool(shapes: list[Shape], setup: Setup) -> None:
    """Nothing: each shape has weights and caches of its own."""
    del shapes, setup


def config_of(shape: Shape) -> MLAConfig:
    """The layer of a shape."""
    hidden, rank, nope, v = WIDTHS[shape.model]
    return MLAConfig(
        hidden_size=hidden,
        num_heads=shape.h_q,
        q_lora_rank=rank,
        kv_lora_rank=512,
        qk_nope_head_dim=nope,
        qk_rope_head_dim=64,
        v_head_dim=v,
        rope=RopeConfig(layout="deinterleaved", yarn=YARN),
        indexer=INDEXER if shape.sparse else None,
    )


def formats_of(shape: Shape) -> tuple[CacheFormat, CacheFormat | None]:
    """Of the cache and of its index keys."""
    config = config_of(shape)
    return config.cache_format(name="v32" if shape.sparse else "dense"), config.index_format()


def blocks_of(shape: Shape) -> int:
    """Of all layers."""
    return shape.layers * shape.b * -(-shape.s_k // 64)


def make_weights(config: MLAConfig, layers: int, device: jax.Device) -> list[MLAParams]:
    """Bfloat16 weights for each layer: the same random ones, in arrays of its own.

    A projection's variance is 1 / hidden_size or more, so that y is about as large as x.
    """

    def weight(stored: jax.ShapeDtypeStruct) -> np.ndarray:
        if len(stored.shape) == 1:  # of a norm
            return np.ones(stored.shape, stored.dtype)
        return host_normal(stored.shape, stored.dtype, scale=config.hidden_size**-0.5)

    one = jax.device_put(jax.tree.map(weight, MLAParams.shapes(config, jnp.bfloat16)), device)
    return [one, *(_copy(one) for _ in range(layers - 1))]


@jax.jit
def _copy(weights: MLAParams) -> MLAParams:
    return jax.tree.map(jnp.copy, weights)


def make_cache(shape: Shape, device: jax.Device, blocks: Blocks = random_blocks) -> PagedCache:
    """Random rows for all but each sequence's last token; blocks in random order."""
    columns = -(-shape.s_k // 64)
    ids = np.random.default_rng(2).permutation(shape.b * columns).astype(np.int32)
    table = BlockTable.create(
        ids.reshape(shape.b, columns), np.full(shape.b, shape.s_k - 1, np.int32), block_size=64
    )
    format, index = formats_of(shape)
    cache = PagedCache.create(
        format, table, num_blocks=1, layers=1, index_format=index, device=device
    )  # its table; the blocks are made random, one array for all layers
    num_blocks = blocks_of(shape)
    return dataclasses.replace(
        cache,
        blocks=blocks(format, num_blocks),
        layers=shape.layers,
        index_blocks=None if index is None else blocks(index, num_blocks),
        index_layers=0 if index is None else shape.layers,
    )


def schedule_of(config: MLAConfig, cache: PagedCache) -> SplitSchedule | None:
    """The dense attention's, made once a step."""
    return None if config.indexer else cache.table.schedule(h_q=config.num_heads)


@partial(jax.jit, static_argnames=("config", "implementation"), donate_argnames="cache")
def step(
    config: MLAConfig,
    weights: list[Any],
    cache: PagedCache,
    x: jax.Array,
    implementation: str | None = None,
) -> tuple[PagedCache, jax.Array, jax.Array]:
    """All layers on the new tokens x [b, 1, hidden].

    Returns:
        The cache with its old lengths, x behind all layers, and the first layer's y.
    """
    before = cache.table
    cache, slots = cache.advance()
    schedule = schedule_of(config, cache)
    ys = []
    for layer, params in enumerate(weights):
        cache, y = decode(
            config, params, x, cache, slots=slots, layer=layer, schedule=schedule,
            implementation=implementation,
        )  # fmt: skip
        ys.append(y)
        x = x + y
    return dataclasses.replace(cache, table=before), x, ys[0]


@partial(jax.jit, static_argnames="config")
def attend(
    config: MLAConfig, cache: PagedCache, q: jax.Array, index_q: jax.Array, weights: jax.Array
) -> jax.Array:
    """The step's attention kernels alone, on q [b, 1, h_q, d_qk]: the sum of one lse a layer.

    So out dies at once, as in the step, and all layers' have the same memory.
    """
    cache, _ = cache.advance()
    schedule = schedule_of(config, cache)
    options: dict[str, Any] = {"d_v": config.kv_lora_rank, "sm_scale": config.sm_scale}
    total = jnp.float32(0)
    for layer in range(cache.layers):
        rows = cache.layer(layer)
        if config.indexer is None:
            _, lse = dense_decode(q, *rows, causal=True, schedule=schedule, **options)
        else:
            keys = cache.index_layer(layer)
            best = index_topk(
                index_q, weights, keys.blocks, cache.table.block_table, cache.table.cache_seqlens,
                format=keys.format, topk=config.indexer.topk, first_block=keys.first_block,
                layer_blocks=keys.num_blocks,
            )  # fmt: skip
            assert isinstance(best, jax.Array)
            _, lse = sparse_decode(
                q, rows.blocks, best, format=rows.format, first_block=rows.first_block,
                layer_blocks=rows.num_blocks, **options,
            )  # fmt: skip
        total += lse[0, 0, 0]
    return total


class Step:
    """A step that is run again and again over the cache that it donates."""

    def __init__(self, programs: Programs, weights: list[Any], cache: PagedCache, x: jax.Array):
        self._step, self._check = programs["kernel"], programs["check"]
        self.weights, self.cache, self.x = weights, cache, x

    def __call__(self) -> tuple[jax.Array, jax.Array]:
        self.cache, x, first = self._step(self.weights, self.cache, self.x)
        return x, first

    def first_in_jax(self) -> jax.Array:
        """The first layer's y, in pure JAX."""
        self.cache, _, first = self._check(self.weights[:1], self.cache, self.x)
        return first


def programs(shape: Shape, pool: None, setup: Setup, *, with_xla: bool) -> Lowered:
    """The step, its first layer in pure JAX, its attention kernels alone, the cache's blocks."""
    del pool, with_xla
    config, made = config_of(shape), jax.ShapeDtypeStruct
    weights = [MLAParams.shapes(config, jnp.bfloat16)] * shape.layers
    cache = jax.eval_shape(lambda: make_cache(shape, setup.device))
    x = made((shape.b, 1, config.hidden_size), jnp.bfloat16)
    queries = (
        made((shape.b, 1, shape.h_q, config.d_qk), jnp.bfloat16),
        made((shape.b, 1, INDEX_HEADS, 128), jnp.float8_e4m3fn),
        made((shape.b, 1, INDEX_HEADS), jnp.float32),
    )
    return {
        **{
            format.name: random_blocks.lower(format, blocks_of(shape))
            for format in formats_of(shape)
            if format is not None
        },
        "kernel": step.lower(config, weights, cache, x),
        "check": step.lower(config, weights[:1], cache, x, implementation="xla"),
        "alone": attend.lower(config, cache, *queries),
    }


def make_calls(shape: Shape, pool: None, setup: Setup, programs: Programs) -> Calls:
    """The layers' weights and caches, and what they run on."""
    del pool
    config, device = config_of(shape), setup.device
    weights = make_weights(config, shape.layers, device)
    # On the device for good, as the step returns it.
    made = make_cache(shape, device, lambda format, _: programs[format.name]())
    cache = jax.device_put(made, device)
    x = normal((shape.b, 1, config.hidden_size), jnp.bfloat16, device)
    queries = (
        normal((shape.b, 1, shape.h_q, config.d_qk), jnp.bfloat16, device, seed=1),
        normal((shape.b, 1, INDEX_HEADS, 128), jnp.float8_e4m3fn, device, seed=2),
        normal((shape.b, 1, INDEX_HEADS), jnp.float32, device, seed=3),
    )
    run, alone = Step(programs, weights, cache, x), programs["alone"]
    return Calls(
        Timed(run, (), shape.layers),
        lambda result: relative_error(result, run),
        {},
        alone=Timed(lambda: alone(run.cache, *queries), (), shape.layers),
        read_once=shape.weight_bytes,
    )


def relative_error(result: tuple[jax.Array, jax.Array], run: Step) -> float:
    """The worst token's of the first layer, against pure JAX; NaN where a layer's y is not finite.

    Only the first layer's: rounding differs, and every layer's input with it.
    """
    x, got = (np.asarray(a, np.float32) for a in result)
    if not np.isfinite(x).all():
        return float("nan")
    expected = np.asarray(run.first_in_jax(), np.float32)
    norm = partial(np.linalg.norm, axis=-1)
    return float((norm(got - expected) / norm(expected)).max())
