"""Whatever arguments come: the result is right, or an error that names the cause; nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tolerances
from jax_flashmla import (
    BlockTable,
    CacheFormat,
    PagedCache,
    cache_append,
    dense_decode,
    sparse_decode,
)

pytestmark = pytest.mark.usefixtures("on_cpu")

STEP_NAMES = ("advance", "append", "with_table", "write", "layer")
REFUSALS = (TypeError, ValueError, NotImplementedError)
NAMES = ("q", "blocks", "rows", "block_table", "cache_seqlens", "positions", "num_new", "schedule")
NAMES += ("indices", "topk_length", "attn_sink", "first_block", "layer_blocks")
NAMES += ("format", "kv_scale", "layer", "slots", "d_v", "sm_scale", "causal", "implementation")

# Few extents, so that calls repeat shapes of which some are compiled; 0 and misfits among them.
extents = st.sampled_from([0, 1, 2, 3])
odd_values = st.sampled_from(
    [None, 1, -1, 1.5, "x", [], [1], (2, 3), True, np.nan, 2**40, np.ma.masked_array([1, 2]), {}]
)
float_dtypes = st.sampled_from([np.float32, jnp.bfloat16, np.float16, np.float64, np.int8])
int_dtypes = st.sampled_from([np.int32, np.int32, np.int64, np.uint8, np.float32, bool])


def floats(*shapes: tuple[int, ...]) -> st.SearchStrategy[Any]:
    def array(shape: tuple[int, ...], dtype: Any, value: float) -> np.ndarray:
        with np.errstate(all="ignore"):
            return np.full(shape, value).astype(dtype)

    values = st.sampled_from([0.5, 2.0, 0.0])
    return st.builds(array, st.sampled_from(shapes), float_dtypes, values) | odd_values


def ints(*shapes: tuple[int, ...]) -> st.SearchStrategy[Any]:
    def array(shape: tuple[int, ...], dtype: Any, numbers: list[int]) -> np.ndarray:
        with np.errstate(all="ignore"):
            return np.resize(np.array(numbers), shape).astype(dtype)

    numbers = st.lists(st.sampled_from([0, 1, 2, 5, 7, -1, 2**31 - 1]), min_size=1, max_size=4)
    return st.builds(array, st.sampled_from(shapes), int_dtypes, numbers) | odd_values


def outcome(call: Callable[[], Any]) -> Any:
    """What a call returns, or None where it is refused by name."""
    try:
        return jax.block_until_ready(call())
    except REFUSALS as error:
        if not any(name in str(error) for name in NAMES):
            raise AssertionError(f"does not name the cause: {error}") from error
        return None


@settings(max_examples=250, suppress_health_check=list(HealthCheck))
@given(
    q=floats(
        (2, 1, 2, 8), (2, 1, 2, 8), (1, 1, 2, 8), (2, 2, 2, 8), (2, 1, 3, 8), (2, 1, 2, 4), (8,)
    ),
    blocks=floats((3, 2, 1, 8), (3, 2, 1, 8), (3, 2, 2, 8), (3, 2, 8), (0, 2, 1, 8), (3, 4, 1, 8)),
    block_table=ints((2, 2), (2, 2), (2, 2), (2, 0), (1, 2), (2,)),
    cache_seqlens=ints((2,), (2,), (2,), (1,), (2, 1), ()),
    d_v=st.sampled_from([4, 4, 4, 8, 9, 0, 4.0, None]),
    causal=st.sampled_from([False, True, 1]),
    format=st.sampled_from([None, None, None, CacheFormat(), "dense"]),
)
def test_dense_decode(format: Any, **arguments: Any) -> None:
    got = outcome(lambda: dense_decode(**arguments, format=format))
    expected = outcome(lambda: dense_decode(**arguments, format=format, implementation="xla"))
    assert (got is None) == (expected is None)
    if got is not None:
        bound = tolerances.Tolerance(absolute=1e-2, relative=1e-2)
        tolerances.assert_decoded(got, expected, out=bound, lse=bound)


few = st.none() | st.none() | odd_values


@settings(max_examples=150, suppress_health_check=list(HealthCheck))
@given(
    q=floats((2, 1, 2, 8), (2, 1, 2, 8), (2, 2, 2, 8), (2, 1, 2, 4)),
    blocks=floats((3, 2, 1, 8), (3, 2, 1, 8), (3, 2, 1, 8), (3, 2, 2, 8), (0, 2, 1, 8)),
    indices=ints((2, 1, 3), (2, 1, 3), (2, 1, 3), (2, 2, 3), (2, 1, 0), (2, 3)),
    topk_length=st.none() | ints((2,), (2, 1), (2, 1, 1), (3,)),
    attn_sink=few | floats((2,), (2,), (3,)),
    first_block=st.sampled_from([0, 0, 0]) | ints((), (1,)),
    layer_blocks=few,
    extra_blocks=few | floats((3, 2, 1, 8), (4, 3, 1, 8)),
    extra_indices=few | ints((2, 1, 3), (2, 1, 4)),
    extra_topk_length=few,
    kv_scale=few,
    format=st.sampled_from([None, None, None, CacheFormat(), "dense"]),
)
def test_sparse_decode(**arguments: Any) -> None:
    got = outcome(lambda: sparse_decode(**arguments, d_v=4))
    expected = outcome(lambda: sparse_decode(**arguments, d_v=4, implementation="xla"))
    assert (got is None) == (expected is None)
    if got is not None:
        bound = tolerances.Tolerance(absolute=1e-2, relative=1e-2)
        tolerances.assert_decoded(got, expected, out=bound, lse=bound)


@settings(max_examples=250, suppress_health_check=list(HealthCheck))
@given(
    blocks=floats((3, 2, 1, 8), (3, 2, 1, 8), (3, 2, 2, 8), (3, 2, 8)),
    rows=floats((2, 1, 1, 8), (2, 1, 1, 8), (2, 2, 1, 8), (2, 1, 8), (2, 0, 1, 8)),
    block_table=ints((2, 2), (2, 2), (2, 0), (1, 2)),
    positions=ints((2,), (2,), (1,), ()),
    num_new=st.none() | ints((2,), (2,), (1,)),
)
def test_cache_append(**arguments: Any) -> None:
    table = arguments["block_table"]
    if isinstance(table, np.ndarray) and table.ndim == 2 and len({*table.flat}) < table.size:
        arguments["block_table"] = np.arange(table.size, dtype=np.int32).reshape(table.shape)
    got = outcome(lambda: cache_append(**arguments))
    expected = outcome(lambda: cache_append(**arguments, implementation="xla"))
    assert (got is None) == (expected is None)
    if got is not None:
        np.testing.assert_array_equal(got.astype(np.float32), expected.astype(np.float32))


@settings(max_examples=150, suppress_health_check=list(HealthCheck))
@given(
    block_table=ints((2, 2), (2, 2), (2, 3), (2,)),
    cache_seqlens=st.none() | ints((2,), (2,), (3,)),
    calls=st.lists(
        st.tuples(st.sampled_from(STEP_NAMES), odd_values),
        max_size=4,
    ),
)
def test_caches(block_table: Any, cache_seqlens: Any, calls: list[tuple[str, Any]]) -> None:
    """Lengths stay within the blocks that a sequence has, whatever the calls."""
    table = outcome(lambda: BlockTable.create(block_table, cache_seqlens, block_size=2))
    if table is None:
        return
    format = CacheFormat(d_qk=4, d_v=2, block_size=2, dtype=np.float32)
    cache = PagedCache.create(format, table, num_blocks=5, layers=2)
    for name, value in calls:
        cache = STEPS[name](cache, value)


def advance(cache: PagedCache, num_new: Any) -> PagedCache:
    """And writes. Lengths are then within the blocks that a sequence has."""
    done = outcome(lambda: cache.advance(1, num_new))
    if done is None:
        return cache
    cache, slots = done
    capacity = np.asarray(cache.table.capacity(5))
    assert np.all(np.asarray(cache.table.cache_seqlens) <= capacity)
    rows = np.ones((len(capacity), 1, 1, 4), np.float32)
    return cache.write(rows, slots, layer=1)


STEPS: dict[str, Callable[[PagedCache, Any], PagedCache]] = {
    "advance": advance,
    "append": lambda cache, value: outcome(lambda: cache.append(value)) or cache,
    "with_table": lambda cache, value: outcome(lambda: cache.with_table(value)) or cache,
    "write": lambda cache, value: (outcome(lambda: cache.write(value, value)), cache)[1],
    "layer": lambda cache, value: (outcome(lambda: tuple(cache.layer(value))), cache)[1],
}
