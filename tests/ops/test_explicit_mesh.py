"""Meshes as `jax.make_mesh` gives them in jax 0.12: with explicit axes."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jax_flashmla
from jax_flashmla import BlockTable, CacheFormat, PagedCache, cache_append, dense_decode

pytestmark = pytest.mark.usefixtures("on_cpu")

FORMAT = CacheFormat(d_qk=24, d_v=16, block_size=4, dtype=jnp.float32)


def make_mesh() -> jax.sharding.Mesh:
    return jax.make_mesh(
        (2, 2),
        ("data", "model"),
        axis_types=(AxisType.Explicit,) * 2,
        devices=jax.devices("cpu")[:4],
    )


def make_cache(layers: int = 1) -> PagedCache:
    """Four sequences of two blocks each, ids counted from each half's first block."""
    table = BlockTable.create(np.array([[0, 1], [2, 3]] * 2), block_size=4)
    return PagedCache.create(FORMAT, table, num_blocks=8, layers=layers)


def sharded(mesh: jax.sharding.Mesh, x: object, specs: object) -> object:
    return jax.tree.map(
        lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)), x, specs
    )


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_sharded_operands_outside_shard_map_are_refused(jit: bool) -> None:
    mesh, cache = make_mesh(), make_cache()
    wrap = jax.jit if jit else lambda f: f
    q = jnp.ones((4, 1, 4, 24), jnp.float32)
    decode = wrap(functools.partial(dense_decode, d_v=16))
    heads = sharded(mesh, q, PartitionSpec(None, None, "model"))
    with pytest.raises(ValueError, match=r"dense_decode must be called inside jax\.shard_map"):
        decode(heads, *cache.layer())
    blocks = sharded(mesh, cache.blocks, PartitionSpec("data"))
    with pytest.raises(ValueError, match=r"cache_append must be called inside.*decode_specs"):
        wrap(cache_append)(blocks, q[:, :, :1], cache.table.block_table, np.zeros(4, np.int32))


@pytest.mark.parametrize("layers", [1, 2])
def test_a_step_under_shard_map(layers: int) -> None:
    mesh, cache = make_mesh(), make_cache(layers)
    rng = np.random.default_rng(0)
    q = rng.standard_normal((4, 1, 4, 24)).astype(np.float32)
    rows = rng.standard_normal((layers, 4, 3, 1, 24)).astype(np.float32)

    def step(cache: PagedCache, q: jax.Array, rows: jax.Array) -> tuple[PagedCache, jax.Array]:
        cache = cache.append(rows)
        outs = [dense_decode(q, *cache.layer(i), d_v=16)[0] for i in range(layers)]
        return cache, jnp.stack(outs)

    specs = cache.specs(batch="data", heads="model")
    of_q = jax_flashmla.decode_specs(batch="data", heads="model").q
    arguments = (cache, q, rows)
    in_specs = (specs, of_q, PartitionSpec(None, "data"))
    mapped = jax.shard_map(
        step, mesh=mesh, in_specs=in_specs, out_specs=(specs, PartitionSpec(None, *of_q))
    )
    after, outs = jax.jit(mapped)(*sharded(mesh, arguments, in_specs))
    outs = np.asarray(outs)
    assert after.check() == []  # ids count from each device's first block
    # The halves one after the other on one device.
    for half in (slice(0, 2), slice(2, 4)):
        table = BlockTable.create(cache.table.block_table[half], block_size=4)
        alone = PagedCache.create(FORMAT, table, num_blocks=4, layers=layers)
        _, expected = step(alone, q[half], rows[:, half])
        np.testing.assert_allclose(outs[:, half], expected, rtol=1e-5, atol=1e-6)


def test_check_still_finds_what_is_wrong_within_a_shard() -> None:
    mesh, cache = make_mesh(), make_cache()
    table = np.array([[0, 1], [2, 3], [0, 1], [0, 9]])
    cache = cache.with_table(table, np.array([1, 1, 1, 5]))
    cache = sharded(mesh, cache, cache.specs(batch="data"))
    found = cache.check()
    assert any(
        "sequence 3 reads block 9 at entry 1, the cache has blocks 0 to 3" in x for x in found
    )
    assert any("sequence 2 writes block 0 at entry 0, which sequences [3] hold" in x for x in found)
    assert not [x for x in found if x.startswith(("sequence 0", "sequence 1"))]
