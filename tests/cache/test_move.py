"""Blocks moved between caches: both pools, every kind of format, meshes, host memory."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_flashmla import BlockTable, CacheFormat, PagedCache
from parallel import devices_of

pytestmark = pytest.mark.usefixtures("on_cpu")

DENSE = CacheFormat(d_qk=24, d_v=16, h_kv=2, block_size=64)
FORMATS = {
    "dense": DENSE,
    "one plane": CacheFormat(name="v32", block_size=64),
    "planes": CacheFormat(name="v4", block_size=64),
}


def make_cache(
    format: CacheFormat = DENSE, *, first: int = 0, num_blocks: int = 8, **options: object
) -> PagedCache:
    """A cache of 3 layers, 2 of them with an index pool, each block's bytes of its own."""
    table = BlockTable.create(np.full((2, 2), -1, np.int32), block_size=64)
    index_format = CacheFormat(name="fp8_index")
    cache = PagedCache.create(
        format, table, num_blocks=num_blocks, layers=3, index_format=index_format, index_layers=2,
        **options,
    )  # fmt: skip

    def fill(x: jax.Array, first: int) -> jax.Array:
        numbers = first + np.arange(x.shape[0]).reshape(-1, *[1] * (x.ndim - 1))
        filled = np.broadcast_to(numbers, x.shape).astype(x.dtype)
        return jax.device_put(filled, x.sharding)

    def pool(blocks, first: int):
        if isinstance(blocks, tuple):
            return tuple(fill(x, first + i * x.shape[0]) for i, x in enumerate(blocks))
        return fill(blocks, first)

    return dataclasses.replace(
        cache, blocks=pool(cache.blocks, first), index_blocks=pool(cache.index_blocks, first)
    )


def numbers(blocks, shards: int = 1, layers: int = 3) -> np.ndarray:
    """The number that each block is filled with [shards, layers, num_blocks]."""
    blocks = blocks if isinstance(blocks, tuple) else (blocks,)
    flat = np.concatenate([np.asarray(x).astype(np.float32) for x in blocks])
    flat = flat.reshape(len(flat), -1)
    assert (flat == flat[:, :1]).all()
    return flat[:, 0].reshape(shards, layers, -1)


@pytest.mark.parametrize("array_per_layer", [False, True])
@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_blocks_go_through_host_memory(format: CacheFormat, array_per_layer: bool) -> None:
    source = make_cache(format, array_per_layer=array_per_layer)
    kept = jax.device_get(source.get_sequence([5, -1, 2]))
    assert isinstance(kept.blocks, np.ndarray)
    assert numbers(kept.blocks.reshape(9, -1)).tolist() == [[[5, 0, 2], [13, 0, 10], [21, 0, 18]]]
    before = make_cache(format, first=100, array_per_layer=not array_per_layer)
    expected = numbers(before.blocks), numbers(before.index_blocks, layers=2)
    for want in expected:
        want[0, :, [7, 0]] = [[5 + 8 * i for i in range(want.shape[1])],
                              [2 + 8 * i for i in range(want.shape[1])]]  # fmt: skip
    after = before.insert_sequences([kept], [[7, -1, 0]])
    np.testing.assert_array_equal(numbers(after.blocks), expected[0])
    np.testing.assert_array_equal(numbers(after.index_blocks, layers=2), expected[1])


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=lambda t: t.name)
def test_blocks_go_between_meshes(axis_type: AxisType) -> None:
    devices = jax.devices("cpu")

    def mesh(shape, some):
        return jax.make_mesh(shape, ("data", "model"), axis_types=(axis_type,) * 2, devices=some)

    def place(cache: PagedCache, mesh) -> PagedCache:
        specs = cache.specs(batch="data", heads="model", shard_kv_heads=True)
        pools = {
            name: jax.tree.map(
                lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)),
                getattr(cache, name),
                getattr(specs, name),
            )
            for name in ("blocks", "index_blocks")
        }
        return dataclasses.replace(cache, **pools)

    source = place(make_cache(), mesh((2, 2), devices[:4]))
    target = place(make_cache(first=100, num_blocks=16), mesh((4, 1), devices[4:]))
    moved = source.get_sequence([1, 3], shard=(1, 2))  # of its 4 blocks in each of 3 layers
    assert moved.blocks.sharding.is_equivalent_to(
        NamedSharding(source.blocks.sharding.mesh, P(None, None, None, "model", None)), 5
    )
    expected = numbers(target.blocks, 4), numbers(target.index_blocks, 4, 2)
    expected[0][2][:, [0, 2]] = [[13, 15], [17, 19], [21, 23]]
    expected[1][2][:, [0, 2]] = [[9, 11], [13, 15]]
    sharding = target.blocks.sharding
    target = target.insert_sequences([moved], [[0, 2]], shard=(2, 4))
    np.testing.assert_array_equal(numbers(target.blocks, 4), expected[0])
    np.testing.assert_array_equal(numbers(target.index_blocks, 4, 2), expected[1])
    assert target.blocks.sharding == sharding


def test_wrong_calls_are_named() -> None:
    cache = make_cache()
    moved = cache.get_sequence([1, 2])
    other = make_cache(FORMATS["planes"])
    three = dataclasses.replace(moved, blocks=jnp.zeros((2, 2, 64, 2, 24), jnp.bfloat16))
    for call, error, message in (
        (
            lambda: other.insert_sequences([moved], [[0, 1]]),
            ValueError,
            "must have the cache's form",
        ),
        (
            lambda: cache.insert_sequences([moved], [[0]]),
            ValueError,
            r"blocks must be .*\[3, 1, 64",
        ),
        (lambda: cache.insert_sequences([three], [[0, 1]]), ValueError, r"got bfloat16\[2, 2, 64"),
        (lambda: cache.insert_sequences([moved], []), ValueError, "as many as sequences, 1, got 0"),
        (lambda: cache.insert_sequences([1], [[0]]), TypeError, "must be CacheBlocks"),
        (lambda: cache.insert_sequences(moved, [0, 1]), TypeError, "must be a list of CacheBlocks"),
        (
            lambda: cache.insert_sequences([moved], [0, 1]),
            ValueError,
            r"block_ids\[0\] must have rank 1",
        ),
        (lambda: cache.get_sequence([[0]]), ValueError, "block_ids"),
        (lambda: cache.get_sequence([0], shard=(2, 2)), ValueError, r"shard\[0\]"),
        (lambda: cache.get_sequence([0], shard=(0, 3)), ValueError, r"shard\[1\] must divide"),
    ):
        with pytest.raises(error, match=message):
            call()
    assert not cache.blocks.is_deleted()


@pytest.mark.gpu
def test_blocks_go_between_gpus() -> None:
    """From one GPU's cache into another's, and into one that both share, without the host."""
    gpus = devices_of("cuda", 2)
    caches = []
    for gpu, first in zip(gpus, (0, 100), strict=True):
        with jax.default_device(gpu):
            caches.append(make_cache(FORMATS["one plane"], first=first))
    moved = caches[0].get_sequence([5, -1, 2])
    assert moved.blocks.devices() == {gpus[0]}
    expected = numbers(caches[1].blocks), numbers(caches[1].index_blocks, layers=2)
    for want in expected:
        want[0, :, [7, 0]] = [[5 + 8 * i for i in range(want.shape[1])],
                              [2 + 8 * i for i in range(want.shape[1])]]  # fmt: skip
    after = caches[1].insert_sequences([moved], [[7, -1, 0]])
    assert after.blocks.devices() == {gpus[1]}
    np.testing.assert_array_equal(numbers(after.blocks), expected[0])
    np.testing.assert_array_equal(numbers(after.index_blocks, layers=2), expected[1])

    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=gpus)
    by_block = NamedSharding(mesh, P("data"))
    shared = make_cache(FORMATS["one plane"], first=50)
    shared = dataclasses.replace(
        shared,
        blocks=jax.device_put(shared.blocks, by_block),
        index_blocks=jax.device_put(shared.index_blocks, by_block),
    )
    before = numbers(shared.blocks, 2)
    back = after.get_sequence([7, 0])
    both = shared.insert_sequences([back], [[3, 1]], shard=(1, 2))
    assert both.blocks.devices() == set(gpus)
    before[1][:, [3, 1]] = [[5, 2], [13, 10], [21, 18]]
    np.testing.assert_array_equal(numbers(both.blocks, 2), before)
