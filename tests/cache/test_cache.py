"""CacheFormat, BlockTable and PagedCache: as pytrees, and against sequences kept apart."""

import copy
import dataclasses
import doctest
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jax_flashmla.cache.paged
from jax_flashmla import (
    CacheFormat,
    PagedCache,
    dense_decode,
    make_schedule,
)
from small_caches import (
    FORMAT,
    LAYOUTS,
    layered_step,
    layers_of,
    make_cache,
    row_numbers,
    whole_step,
)


@pytest.fixture(scope="module", autouse=True)
def platform(request):
    """The CPU, unless a test asks for CUDA: most use dimensions that its kernels do not take."""
    with jax.default_device(jax.devices(getattr(request, "param", "cpu"))[0]):
        yield


on_each_platform = pytest.mark.parametrize(
    "platform", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True
)


@pytest.fixture(params=LAYOUTS.values(), ids=LAYOUTS)
def layout(request):
    return request.param


# Pytrees.


def test_formats_are_values():
    assert CacheFormat(d_qk=6, d_v=4, h_kv=2, block_size=4, dtype="bfloat16") == FORMAT
    assert hash(FORMAT) == hash(copy.deepcopy(FORMAT))
    assert dataclasses.replace(FORMAT, d_v=3) != FORMAT
    assert FORMAT.bytes_per_token == 24
    assert CacheFormat().bytes_per_token == 1152
    assert jax.tree.leaves(FORMAT) == []
    assert FORMAT.allocate(5).shape == (5, 4, 2, 6)
    device = jax.devices("cpu")[-1]
    blocks = CacheFormat(dtype=jnp.float16).allocate(2, device=device)
    assert (blocks.shape, blocks.dtype) == ((2, 64, 1, 576), jnp.float16)
    assert blocks.devices() == {device}


def test_flatten_and_map(layout):
    cache = make_cache([[0, 1], [2, -1]], [5, 1], **layout)
    leaves, tree = jax.tree.flatten(cache)
    assert len(leaves) == (6 if "array_per_layer" in layout else 4)
    rebuilt = jax.tree.unflatten(tree, leaves)
    assert isinstance(rebuilt, PagedCache)
    assert all(x is y for x, y in zip(jax.tree.leaves(rebuilt), leaves, strict=True))
    doubled = jax.tree.map(lambda x: x * 2, cache)
    assert doubled.table.cache_seqlens.tolist() == [10, 2]
    assert doubled.format == FORMAT
    assert doubled.table.block_size == 4
    assert jax.tree.map(lambda _: None, cache).overflow is None  # specs, abstract values, ...
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(cache)]
    assert {".table.block_table", ".table.cache_seqlens", ".overflow"} < set(paths)


def test_equal_caches_share_a_trace(layout):
    traces = []

    @jax.jit
    def step(cache):
        traces.append(None)
        return cache.advance()[0]

    step(step(make_cache([[0, 1]], **layout)))
    assert len(traces) == 1
    step(make_cache([[0, 1]], num_blocks=13, **layout))
    assert len(traces) == 2


def test_checkpoint(tmp_path, layout):
    checkpoint = pytest.importorskip("orbax.checkpoint")
    cache = make_cache([[7, 1], [2, -1]], [5, 1], **layout)
    cache = cache.append(row_numbers((cache.layers, 2, 4), 100))
    assert cache.overflow.tolist() == [1, 1]
    with checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "cache", cache)
        checkpointer.wait_until_finished()
        empty = make_cache([[0, 0], [0, 0]], **layout)
        restored = checkpointer.restore(tmp_path / "cache", jax.eval_shape(lambda: empty))
    assert isinstance(restored, PagedCache)
    assert jax.tree.structure(restored) == jax.tree.structure(cache)
    np.testing.assert_array_equal(layers_of(restored), layers_of(cache))
    assert restored.table.block_table.tolist() == [[7, 1], [2, -1]]
    assert restored.table.cache_seqlens.tolist() == [8, 4]
    assert restored.overflow.tolist() == [1, 1]


# Steps against a model.


counts = st.integers(-1, 4)


@on_each_platform
@pytest.mark.parametrize("step", [layered_step, whole_step])
@settings(max_examples=25)
@given(
    owned=st.lists(st.integers(0, 3), min_size=3, max_size=3),
    steps=st.lists(st.lists(counts, min_size=3, max_size=3), min_size=1, max_size=6),
    padding=st.sampled_from([-1, 12, 2147480000]),
    seed=st.integers(0, 99),
)
@pytest.mark.parametrize("name", LAYOUTS)
def test_steps_append_to_each_sequence_alone(platform, name, step, owned, steps, padding, seed):
    ids = np.random.default_rng(seed).permutation(12)
    block_table = np.full((3, 3), padding, np.int32)
    for i, n in enumerate(owned):
        block_table[i, :n] = ids[3 * i : 3 * i + n]
    cache = make_cache(block_table, **LAYOUTS[name])
    expected = layers_of(cache).copy()
    layers = len(expected)
    lengths, overflow = [0, 0, 0], [0, 0, 0]
    for number, num_new in enumerate(steps):
        rows = row_numbers((layers, 3, 3), 1000 * number)
        cache = step(cache, rows, np.array(num_new, np.int32))
        for i in range(3):
            for j in range(min(3, num_new[i])):
                if lengths[i] == 4 * owned[i]:
                    overflow[i] += 1
                    continue
                block, slot = divmod(lengths[i], 4)
                bits = np.asarray(rows[:, i, j]).view(np.uint16)
                expected[:, block_table[i, block], slot] = bits
                lengths[i] += 1
    np.testing.assert_array_equal(layers_of(cache), expected)
    assert cache.table.cache_seqlens.tolist() == lengths
    assert cache.overflow.tolist() == overflow
    dropped = [f"sequence {i} dropped {n} rows" for i, n in enumerate(overflow) if n]
    assert cache.check() == dropped


@pytest.mark.parametrize("cache_seqlens", [-3, 9, 2**31 - 1, -(2**31)])
def test_a_length_outside_the_table_is_brought_back(cache_seqlens):
    cache = make_cache([[3, 5]], [cache_seqlens])
    before = layers_of(cache)
    cache = cache.append(row_numbers((1, 2), 1))
    assert cache.table.cache_seqlens.tolist() == [2 if cache_seqlens < 0 else 8]
    assert cache.overflow.tolist() == [0 if cache_seqlens < 0 else 2]
    changed = np.argwhere((layers_of(cache) != before).any(axis=(-1, -2)))
    assert changed.tolist() == ([[0, 3, 0], [0, 3, 1]] if cache_seqlens < 0 else [])


def test_rows_of_one_layer_need_no_layer_axis():
    rows = row_numbers((1, 2, 3), 0)
    with_axis, without = make_cache([[0], [1]]).append(rows), make_cache([[0], [1]]).append(rows[0])
    np.testing.assert_array_equal(layers_of(with_axis), layers_of(without))


def test_slots_give_the_positions_of_the_new_tokens():
    cache = make_cache([[0, 1], [2, 3]], [3, 7])
    cache, slots = cache.advance(2)
    assert slots.positions.tolist() == [3, 7]
    assert slots.num_new.tolist() == [2, 1]
    assert cache.table.cache_seqlens.tolist() == [5, 8]


@pytest.mark.parametrize(
    ("name", "traced"),
    [*((name, False) for name in LAYOUTS), ("one layer", True), ("one array", True)],
)
def test_a_layer_is_attended_as_if_it_were_alone(name, traced):
    # 12 and 13 are no blocks.
    cache = make_cache([[7, 1, 9], [2, 12, 13]], [9, 12], **LAYOUTS[name])
    shape = (cache.layers * 12, 4, 2, 6)
    blocks = jax.random.normal(jax.random.key(0), shape).astype(jnp.bfloat16)
    apart = tuple(jnp.split(blocks, cache.layers))
    is_tuple = isinstance(cache.blocks, tuple)
    cache = dataclasses.replace(cache, blocks=apart if is_tuple else blocks)
    q = jax.random.normal(jax.random.key(1), (2, 1, 4, 6)).astype(jnp.bfloat16)

    def decode(cache, i):
        return dense_decode(q, *cache.layer(i), d_v=4)

    if traced:
        decode = jax.jit(decode)
    for i in range(cache.layers):
        out, lse = decode(cache, jnp.int32(i) if traced else i)
        alone = dense_decode(q, apart[i], cache.table.block_table, cache.table.cache_seqlens, d_v=4)
        np.testing.assert_array_equal(out, alone[0])
        np.testing.assert_array_equal(lse, alone[1])


# A model's steps are in place: one executable, no copy of the cache, the donated buffer comes back.


@on_each_platform
def test_scan_over_layers_and_steps_is_in_place(platform):
    block_table = np.arange(32, dtype=np.int32).reshape(2, 16)
    cache = make_cache(block_table, format=CacheFormat(), num_blocks=64, layers=6)
    size = cache.blocks.nbytes

    def run(cache, x):
        def step(carry, _):
            cache, x = carry
            cache, slots = cache.advance()
            schedule = make_schedule(cache.table.cache_seqlens, h_q=4)

            def layer(carry, i):
                cache, x = carry
                cache = cache.write(x[:, None, None, :], slots, layer=i)
                q = jnp.broadcast_to(x[:, None, None, :], (2, 1, 4, 576))
                out, _ = dense_decode(q, *cache.layer(i), schedule=schedule)
                return (cache, x.at[:, :512].add(out[:, 0, 0])), None

            return jax.lax.scan(layer, (cache, x), jnp.arange(6, dtype=jnp.int32))[0], None

        return jax.lax.scan(step, (cache, x), length=3)[0]

    x = jnp.ones((2, 576), jnp.bfloat16)
    compiled = jax.jit(run, donate_argnums=0).lower(cache, x).compile()
    copies = re.findall(r"= \(?bf16\[(?:384|64),64,1,576\]\S* copy\S*\(", compiled.as_text())
    assert copies == []
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= size
    assert memory.temp_size_in_bytes < size / 6  # not even of one layer
    pointer = cache.blocks.unsafe_buffer_pointer()
    cache, _ = compiled(cache, x)
    assert cache.blocks.unsafe_buffer_pointer() == pointer
    assert cache.table.cache_seqlens.tolist() == [3, 3]


# Over devices: each has its own sequences, and block ids of its own.


@pytest.mark.parametrize("step", [layered_step, whole_step])
def test_batch_over_devices(layout, step):
    num_devices = 4
    mesh = jax.make_mesh(
        (num_devices,),
        ("data",),
        devices=jax.devices("cpu")[:num_devices],
        axis_types=(jax.sharding.AxisType.Auto,),
    )
    tables = np.arange(24, dtype=np.int32).reshape(num_devices, 2, 3) % 6  # ids are per device
    lengths = np.array([[0, 3], [11, 12], [5, 4], [7, 1]], np.int32)
    num_new = np.array([[1, 2], [2, 2], [0, 1], [2, 1]], np.int32)
    num_layers = layout.get("layers", 1)
    rows = row_numbers((num_layers, num_devices * 2, 2), 1)

    split = jax.P("data")
    cache = make_cache(
        tables.reshape(-1, 3),
        lengths.ravel(),
        num_blocks=6 * num_devices,
        device=jax.sharding.NamedSharding(mesh, split),
        **layout,
    )
    specs = jax.tree.map(lambda _: split, cache)
    sharded = jax.shard_map(
        lambda cache, rows, num_new: step(cache, rows, num_new),
        mesh=mesh,
        in_specs=(specs, jax.P(None, "data"), split),
        out_specs=specs,
    )
    cache = jax.jit(sharded, donate_argnums=0)(cache, rows, num_new.ravel())
    for i in range(num_devices):
        alone = make_cache(tables[i], lengths[i], num_blocks=6, **layout)
        alone = step(alone, rows[:, 2 * i : 2 * i + 2], num_new[i])
        local = jax.tree.map(lambda x, i=i: x.addressable_shards[i].data, cache)
        for got, expected in zip(jax.tree.leaves(local), jax.tree.leaves(alone), strict=True):
            np.testing.assert_array_equal(got, expected)


# With an allocator.


def test_docstrings():
    result = doctest.testmod(jax_flashmla.cache.paged)
    assert result.attempted > 0
    assert result.failed == 0


def test_a_cache_is_shown_without_its_arrays():
    shown = repr(make_cache([[0, 1], [2, -1]], [5, 1]))
    assert shown.startswith("PagedCache(b=2, max_blocks=2, num_blocks=12, layers=1, format=")
    assert "Array" not in shown
