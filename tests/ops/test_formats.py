"""cache_append and dense_decode over every cache format: bytes by definition, values as stored.

What must not be read is poisoned: unused bytes are 0xff, which as e4m3 and as float32 is NaN.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import naive
import tolerances
from jax_flashmla import CacheFormat, cache_append, dense_decode
from stored import decode_inputs, dequantised, poisoned_blocks, scale_of, store

CODED = ("v32", "v32_nope", "v4", "v41", "v41_fp4", "fp8_row", "fp8_index")
MAX_BLOCKS = 3


def hostile_rows(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    rows = rng.standard_normal(shape, np.float32)
    rows *= np.exp2(rng.integers(-20, 12, (*shape[:-1], 1))).astype(np.float32)
    flat = rows.reshape(-1)
    for value in (np.nan, np.inf, -np.inf, -0.0, 1e-40, 6e4):
        flat[rng.integers(0, flat.size, 3)] = value
    return rows.astype(jnp.dtype(dtype))


def block_sizes(name: str) -> tuple[int, ...]:
    return (64,) if name == "fp8_index" else (64, 53, 1)


@functools.cache
def jitted_append(format: CacheFormat, implementation: str) -> Callable[..., jax.Array]:
    append = functools.partial(cache_append, format=format, implementation=implementation)
    return jax.jit(append, donate_argnums=0)


def check_append(
    format: CacheFormat, rows_dtype: str, implementation: str, seed: int, positions: list[int]
) -> None:
    rng = np.random.default_rng(seed)
    b, s_new = len(positions), 70
    blocks = poisoned_blocks(format, b * MAX_BLOCKS + 2)
    table = rng.permutation(len(blocks))[: b * MAX_BLOCKS].reshape(b, MAX_BLOCKS)
    rows = hostile_rows(rng, (b, s_new, format.h_kv, format.d_qk), rows_dtype)
    num_new = rng.integers(0, s_new + 2, b).astype(np.int32)
    table[0, 1] = 2147480000  # what would go there is dropped
    expected = blocks.copy()
    for i in range(b):
        token = positions[i] + np.arange(min(num_new[i], s_new))
        entry = token // format.block_size
        keep = (token >= 0) & (entry < MAX_BLOCKS)
        keep &= table[i, np.clip(entry, 0, MAX_BLOCKS - 1)] < len(blocks)
        slots = table[i, entry[keep]] * format.block_size + token[keep] % format.block_size
        if keep.any():
            store(format, expected, rows[i, : len(token)][keep], slots)
    append = jitted_append(format, implementation)
    cache = jnp.array(blocks)
    arrays = (rows, table.astype(np.int32), np.array(positions, np.int32))
    got = append(
        cache, *map(jnp.array, arrays), num_new=jnp.array(num_new), kv_scale=scale_of(format)
    )
    assert cache.is_deleted()
    as_bytes = lambda x: np.asarray(x).view(np.uint8)  # noqa: E731
    np.testing.assert_array_equal(as_bytes(got), as_bytes(expected))


@pytest.mark.parametrize("rows_dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("name", CODED)
def test_append_stores_what_quantise_defines(
    name: str, rows_dtype: str, implementation: str
) -> None:
    for block_size in block_sizes(name):
        format = CacheFormat(name=name, block_size=block_size)
        check_append(format, rows_dtype, implementation, 0, [0, 3, -2])


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("d_qk", "row_stride", "h_kv"), [(576, 640, 1), (24, 40, 2), (7, 9, 3)])
def test_append_leaves_the_pad_of_wide_rows(
    d_qk: int, row_stride: int, h_kv: int, dtype: str, implementation: str
) -> None:
    format = CacheFormat(
        d_qk=d_qk, d_v=7, h_kv=h_kv, block_size=8, dtype=dtype, row_stride=row_stride
    )
    check_append(format, dtype, implementation, 1, [0, 3])


@settings(max_examples=15)
@given(
    name=st.sampled_from(CODED),
    seed=st.integers(0, 2**32 - 1),
    positions=st.lists(st.integers(-80, 200) | st.just(2**31 - 1), min_size=2, max_size=2),
)
@pytest.mark.usefixtures("on_cpu")
def test_append_at_any_position(name: str, seed: int, positions: list[int]) -> None:
    check_append(CacheFormat(name=name), "bfloat16", "kernel", seed, positions)


@pytest.mark.parametrize("name", ["v32", "v4"])
def test_append_under_vmap(name: str, implementation: str) -> None:
    format = CacheFormat(name=name, block_size=5)
    rng = np.random.default_rng(2)
    blocks = np.stack([poisoned_blocks(format, 4)] * 3)
    rows = hostile_rows(rng, (3, 2, 4, 1, format.d_qk), "bfloat16")
    table = np.array([[0, 1], [3, 2]], np.int32)
    positions = np.array([[0, 3], [4, 9], [2, -1]], np.int32)
    append = functools.partial(cache_append, format=format, implementation=implementation)
    got = jax.vmap(append, in_axes=(0, 0, None, 0))(blocks, rows, table, positions)
    expected = [
        append(*map(jnp.array, (blocks[i], rows[i], table, positions[i]))) for i in range(3)
    ]
    np.testing.assert_array_equal(np.asarray(got), np.stack(expected))


# dense_decode, on the CPU and in the reference.


@pytest.mark.parametrize("implementation", ["xla", "kernel"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("block_size", [64, 53])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["v32", "fp8_row"])
@pytest.mark.usefixtures("on_cpu")
def test_decode_attends_to_the_stored_values(
    name: str, dtype: str, block_size: int, causal: bool, implementation: str
) -> None:
    format = CacheFormat(name=name, dtype=dtype, block_size=block_size)
    q, blocks, table, lengths = decode_inputs(format, [150, 0, 77, 1], h_q=5, s_q=2)
    out, lse = dense_decode(
        *map(jnp.array, (q, blocks, table, lengths)),
        format=format,
        kv_scale=scale_of(format),
        causal=causal,
        implementation=implementation,
    )
    assert out.dtype == dtype
    rows = dequantised(format, blocks)
    for i, length in enumerate(lengths):
        token = np.arange(length)
        keys = rows[table[i, token // block_size], token % block_size]
        expected = naive.dense(q[i], keys, int(length), d_v=512, causal=causal)
        tolerances.assert_decoded((out[i], lse[i]), expected)


@pytest.mark.parametrize("scale", [-0.25, 3e-3, 1e4])
@pytest.mark.usefixtures("on_cpu")
def test_kv_scale_may_be_any_number_and_traced(scale: float) -> None:
    format = CacheFormat(name="fp8_row", block_size=16)
    q, blocks, table, lengths = decode_inputs(format, [90, 33], h_q=4, s_q=1)
    run = jax.jit(dense_decode, static_argnames=("format", "implementation"))
    arrays = tuple(map(jnp.array, (q / 100, blocks, table, lengths)))
    got, expected = (
        run(*arrays, format=format, kv_scale=jnp.float32(scale), implementation=implementation)
        for implementation in ("kernel", "xla")
    )
    out = np.asarray(got[0], np.float32), np.asarray(expected[0], np.float32)
    np.testing.assert_allclose(*out, rtol=0.02, atol=1e-3 * abs(scale))
    np.testing.assert_allclose(got[1], expected[1], rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("on_cpu")
def test_scales_that_are_no_powers_of_two() -> None:
    format = CacheFormat(name="v32", block_size=16)
    q, blocks, table, lengths = decode_inputs(format, [90, 33], h_q=4, s_q=1)
    used = (blocks[:, :, 0, 512:516] != 0xFF).any(axis=-1)
    scales = np.random.default_rng(3).uniform(3e-4, 2e-3, (used.sum(), 4)).astype(np.float32)
    blocks[used, 0, 512:528] = scales.view(np.uint8)
    arrays = tuple(map(jnp.array, (q, blocks, table, lengths)))
    got = dense_decode(*arrays, format=format, implementation="kernel")
    expected = dense_decode(*arrays, format=format, implementation="xla")
    tolerances.assert_decoded(got, tuple(map(np.asarray, expected)))


@pytest.mark.parametrize(
    ("dtype", "d_qk", "d_v", "row_stride", "h_kv"),
    [("bfloat16", 576, 512, 640, 1), ("float32", 20, 16, 33, 2), ("float16", 24, 24, 32, 1)],
)
@pytest.mark.parametrize("implementation", ["xla", "kernel"])
@pytest.mark.usefixtures("on_cpu")
def test_decode_of_rows_wider_than_d_qk(
    dtype: str, d_qk: int, d_v: int, row_stride: int, h_kv: int, implementation: str
) -> None:
    format = CacheFormat(
        d_qk=d_qk, d_v=d_v, h_kv=h_kv, block_size=8, dtype=dtype, row_stride=row_stride
    )
    q, blocks, table, lengths = decode_inputs(format, [100, 7], h_q=4, s_q=2)
    narrow = blocks[..., :d_qk].copy()
    got = dense_decode(
        *map(jnp.array, (q, blocks, table, lengths)),
        d_v=d_v,
        format=format,
        implementation=implementation,
    )
    expected = dense_decode(
        *map(jnp.array, (q, narrow, table, lengths)), d_v=d_v, implementation=implementation
    )
    for x, y in zip(got, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))
