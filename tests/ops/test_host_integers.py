"""Integers from the host become int32 in one place, range-checked, whatever jax_enable_x64 says."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cases
import jax_flashmla
from jax_flashmla import BlockTable, cache_append, copy_blocks, dense_decode, make_schedule

pytestmark = pytest.mark.usefixtures("on_cpu")

TABLE, LENGTHS = [[3, 1], [0, 2]], [70, 9]


def blocks() -> jax.Array:
    return jnp.ones((4, 64, 1, 24), jnp.bfloat16)


def decode(table: Any, lengths: Any) -> jax.Array:
    q = jnp.ones((2, 1, 4, 24), jnp.bfloat16)
    return dense_decode(q, blocks(), table, lengths, d_v=16)[1]


CALLS: dict[str, Callable[[Any, Any], Any]] = {
    "dense_decode": decode,
    "make_schedule": lambda table, lengths: make_schedule(lengths, h_q=4).cuts,
    "BlockTable": lambda table, lengths: jax.tree.leaves(
        BlockTable.create(table, lengths, block_size=64)
    ),
    "cache_append": lambda table, lengths: cache_append(
        blocks(), jnp.zeros((2, 1, 1, 24), jnp.bfloat16), table, lengths, num_new=[1, 1]
    ),
    "copy_blocks": lambda table, lengths: copy_blocks(blocks(), table[0], table[1]),
}


def same(got: Any, expected: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.parametrize("x64", [False, True], ids=["x64 off", "x64 on"])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_every_integer_type_is_taken(call: Callable, x64: bool) -> None:
    expected = call(np.array(TABLE, np.int32), np.array(LENGTHS, np.int32))
    with jax.enable_x64(x64) if hasattr(jax, "enable_x64") else contextlib.nullcontext():
        for dtype in (np.int64, np.uint32, np.int16, np.uint8):
            same(call(np.array(TABLE, dtype), np.array(LENGTHS, dtype)), expected)
        same(call(jnp.array(TABLE), jnp.array(LENGTHS)), expected)
        if call is not CALLS["copy_blocks"]:  # which donates
            same(jax.jit(call)(jnp.array(TABLE), jnp.array(LENGTHS)), expected)


@pytest.mark.parametrize("x64", [False, True], ids=["x64 off", "x64 on"])
@pytest.mark.parametrize("value", [2**32 + 1, 2**31, -(2**31) - 1])
def test_what_does_not_fit_is_refused(value: int, x64: bool) -> None:
    with jax.enable_x64(x64):
        for arguments in (([[value, 1], [0, 2]], LENGTHS), (TABLE, [value, 1])):
            for call in (CALLS["dense_decode"], CALLS["BlockTable"]):
                with pytest.raises(ValueError, match=f"must fit in int32, got {value}"):
                    call(*map(np.array, arguments))
        format, table = jax_flashmla.CacheFormat(d_qk=24, d_v=16), BlockTable.create(TABLE)
        cache = jax_flashmla.PagedCache.create(format, table, num_blocks=4)
        with pytest.raises(ValueError, match="num_new must fit in int32"):
            cache.advance(1, [value, 1])


def test_traced_ones_are_clipped() -> None:
    """So that a length that is too long does not wrap to a short one."""
    with jax.enable_x64(True):
        table = jnp.array([[0, 2**32 + 1]])
        q = jnp.ones((1, 1, 4, 24), jnp.bfloat16)

        def lse(lengths: jax.Array) -> jax.Array:
            return dense_decode(q, blocks(), table, lengths, d_v=16)[1]

        with pytest.raises(ValueError, match="block_table must fit in int32, got 4294967297"):
            lse(jnp.array([5]))
        table = np.array([[0, 1]], np.int32)
        same(jax.jit(lse)(jnp.array([2**32 + 1])), lse(np.array([128], np.int32)))


@pytest.mark.parametrize("array_per_layer", [False, True])
def test_numpy_rows_are_taken_where_layers_are_looped_over(array_per_layer: bool) -> None:
    format = jax_flashmla.CacheFormat(d_qk=24, d_v=16, block_size=4, dtype=np.float32)
    table = BlockTable.create(np.array([[0, 1], [2, 3]]), block_size=4)
    cache = jax_flashmla.PagedCache.create(
        format, table, num_blocks=4, layers=2, array_per_layer=array_per_layer
    )
    rows = np.random.default_rng(cases.SEED).standard_normal((2, 2, 3, 1, 24)).astype(np.float32)
    cache = cache.append(rows, num_new=np.array([3, 2]))
    same(cache.table.cache_seqlens, [3, 2])
    for layer in range(2):
        _, slots = cache.advance(1)
        written = cache.write(rows[layer, :, :1], slots, layer=layer)
        got = written.layer(layer)
        same(np.asarray(got.blocks)[got.block_table[0, 0], :3], rows[layer, 0])
        same(np.asarray(got.blocks)[got.block_table[1, 0], 2], rows[layer, 1, 0])
