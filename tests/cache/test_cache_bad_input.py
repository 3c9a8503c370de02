"""Wrong calls of the paged cache's methods get an error that names what is wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_flashmla import BlockTable, CacheFormat, PagedCache
from small_caches import FORMAT, make_cache

pytestmark = pytest.mark.usefixtures("on_cpu")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"name": "fp8"}, ValueError, "name must be .*, got 'fp8'"),
        ({"d_v": 577}, ValueError, "d_v must be at most d_qk = 576, got 577"),
        ({"name": "v32", "d_v": 256}, ValueError, 'd_v must be 512 in format "v32", got 256'),
        ({"name": "v4", "h_kv": 2}, ValueError, 'h_kv must be 1 in format "v4", got 2'),
        ({"name": "v4", "dtype": jnp.float32}, TypeError, "dtype must be bfloat16 or float16"),
        ({"name": "fp8_index", "block_size": 32}, ValueError, "block_size must be 64 in format"),
        ({"name": "v32", "row_stride": 656}, ValueError, "row_stride must be None in format"),
        ({"row_stride": 575}, ValueError, "row_stride must be at least d_qk = 576, got 575"),
        ({"block_size": 0}, ValueError, "block_size must be between 1"),
        ({"h_kv": 1.0}, TypeError, "h_kv must be a Python int"),
        ({"dtype": "int8"}, TypeError, "dtype must be bfloat16, float16 or float32, got int8"),
        ({"dtype": "fp8"}, TypeError, "dtype must be a dtype, got 'fp8' of type str"),
        ({"name": ["v32"]}, ValueError, r"name must be .*, got \['v32'\]"),
    ],
)
def test_wrong_formats_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        CacheFormat(**arguments)


ROW = jnp.zeros((1, 1, 2, 6), jnp.bfloat16)


def single():
    return make_cache([[0, 1]])


def double():
    return make_cache([[0, 1]], layers=2)


def apart():
    return make_cache([[0, 1]], layers=2, array_per_layer=True)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: FORMAT.allocate(0), ValueError, "num_blocks must be between 1"),
        (
            lambda: make_cache([[0]], num_blocks=2**30, layers=4),
            ValueError,
            "num_blocks must be between 1 and 536870911, got 1073741824",
        ),
        (lambda: make_cache([[0]], layers=0), ValueError, "layers must be between 1"),
        (lambda: make_cache([0, 1]), ValueError, r"block_table must have rank 2"),
        (lambda: make_cache([[0]], [1, 2]), ValueError, "block_table must have one row"),
        (lambda: BlockTable.create(np.zeros((1, 2))), TypeError, "block_table must have dtype"),
        (
            lambda: BlockTable.create(np.zeros((1, 2), np.int32), block_size=0),
            ValueError,
            "block_size must be between 1",
        ),
        (
            lambda: PagedCache.create(CacheFormat(), single().table, num_blocks=2),
            ValueError,
            "table must have format's block_size = 64, got 4",
        ),
        (
            lambda: PagedCache.create(FORMAT, np.zeros((1, 2), np.int32), num_blocks=2),
            TypeError,
            "table must be a BlockTable, got",
        ),
        (
            lambda: PagedCache.create(FORMAT, single().table, num_blocks=2, array_per_layer=2),
            TypeError,
            "array_per_layer must be a Python bool .*, got 2",
        ),
        (
            lambda: PagedCache.create(FORMAT, single().table, num_blocks=2, device="cpu"),
            TypeError,
            "device must be a jax.Device, .* got 'cpu' of type str",
        ),
        (
            lambda: single().specs(heads="x", shard_kv_heads="no"),
            TypeError,
            "shard_kv_heads must be a Python bool .*, got 'no'",
        ),
        (lambda: single().advance(0), ValueError, "s_new must be between 1"),
        (lambda: single().advance(jnp.int32(1)), TypeError, "s_new must be a Python int"),
        (
            lambda: single().advance(1, jnp.ones(2, jnp.int32)),
            ValueError,
            r"num_new must have one entry per sequence, b = 1, got shape \(2,\)",
        ),
        (
            lambda: single().write(ROW, single().advance(2)[1]),
            ValueError,
            r"rows must have the s_new = 2 of the step's advance\(\), got shape \(1, 1, 2, 6\)",
        ),
        (lambda: single().append(ROW[0]), ValueError, r"rows must be \[layers = 1, b, s_new"),
        (lambda: single().append(ROW[..., :5]), ValueError, "rows must end in blocks'"),
        (lambda: double().append(ROW), ValueError, r"rows must be \[layers = 2, b, s_new"),
        (lambda: double().append(ROW[None]), ValueError, r"rows must be \[layers = 2, b, s_new"),
        (lambda: single().layer(1), ValueError, "layer must be between 0 and 0, got 1"),
        (lambda: double().layer(), ValueError, "layer must be given: the cache has 2 layers"),
        (lambda: double().layer(jnp.int32(5)), ValueError, "layer must be between 0 and 1, got 5"),
        (
            lambda: double().layer(jnp.int32(-1)),
            ValueError,
            "layer must be between 0 and 1, got -1",
        ),
        (lambda: double().layer(jnp.float32(1)), TypeError, "layer must be an integer scalar"),
        (lambda: double().layer(jnp.zeros(2, jnp.int32)), TypeError, "layer must be an integer"),
        (
            lambda: jax.jit(lambda i: double().layer(i))(jnp.float32(0)),
            TypeError,
            "layer must be an integer scalar, got a traced value",
        ),
        (lambda: single().write(ROW, None), TypeError, r"slots must be the Slots of .*advance\(\)"),
        (lambda: double().layer(2), ValueError, "layer must be between 0 and 1, got 2"),
        (lambda: apart().layer(-1), ValueError, "layer must be between 0 and 1, got -1"),
        (lambda: jax.jit(apart().layer)(jnp.int32(0)), TypeError, "layer must be known while"),
        (
            lambda: single().with_table(np.zeros((2, 2), np.int32)),
            ValueError,
            r"block_table must have one row per sequence, b = 1, got shape \(2, 2\)",
        ),
    ],
)
def test_wrong_calls_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("table", lambda cache: cache.advance()),
        ("table", lambda cache: cache.append(ROW)),
        ("cache", lambda cache: cache.check()),
        ("cache", lambda cache: cache.get_sequence([0])),
        ("cache", lambda cache: cache.insert_sequences([], [])),
    ],
)
def test_a_donated_cache_is_named(name, call):
    cache = single()
    jax.jit(lambda cache: cache.advance()[0], donate_argnums=0)(cache)
    with pytest.raises(ValueError, match=f"^{name} must have live arrays, .* use the {name} that"):
        call(cache)


def test_moving_under_jit_is_refused():
    kept = single().get_sequence([0])
    for name, call in (
        ("get_sequence", lambda cache: cache.get_sequence([0])),
        ("insert_sequences", lambda cache: cache.insert_sequences([kept], [[1]])),
    ):
        with pytest.raises(TypeError, match=f"^{name} cannot be called under jit"):
            jax.jit(call)(single())


def test_any_tree_of_a_cache_can_be_printed():
    cache = single()
    assert repr(cache).startswith("PagedCache(b=1, max_blocks=2, num_blocks=")
    assert repr(jax.eval_shape(lambda x: x, cache)) == repr(cache)
    for tree in (cache.specs(batch="data"), jax.tree.map(lambda _: None, cache)):
        assert repr(tree).startswith("PagedCache(blocks=")
