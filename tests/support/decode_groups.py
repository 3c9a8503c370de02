"""Groups of cases of dense_decode on the device, in any format that it takes.

A group has one shape but for b: its 64 sequences are attended by the reference once for each mask,
and every case of the group is compared with the first b of them. What must not be read is NaN.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

import cases
import tolerances
from jax_flashmla import CacheFormat, dense_decode
from jax_flashmla.cache import quantise
from stored import scale_of
from tolerances import Tolerance

BLOCK_SIZE = 64
kernel = functools.partial(dense_decode, implementation="kernel")
reference = functools.partial(dense_decode, implementation="xla")
TOLERANCES = (tolerances.OUT, tolerances.LSE)


class Group:
    """The sequences of one shape, on the device."""

    def __init__(
        self,
        s_k: int,
        h_kv: int,
        s_q: int,
        h_q: int,
        *,
        b: int = 64,
        zero_lengths: bool = False,
        dtype: str = "bfloat16",
        format: str = "dense",
    ) -> None:
        rng = np.random.default_rng([cases.SEED, h_q])
        #: On the host, as slices of it there need no compilation.
        self.q = cases.normal(rng, (b, s_q, h_q, 576), dtype, cases.QUERY_SCALE)
        self._expected: dict[tuple[bool, bool], tuple[jax.Array, jax.Array]] = {}
        self._cache = functools.partial(_cache, s_k, h_kv, b, zero_lengths, dtype, format)
        #: What dense_decode is to be told of the cache.
        self.options = {}
        if format != "dense":
            of = CacheFormat(name=format, dtype=dtype, block_size=BLOCK_SIZE)
            self.options = {"format": of, "kv_scale": scale_of(of)}

    def arguments(self, ragged: bool, b: int | None = None) -> tuple:
        blocks, table, lengths = self._cache(ragged)
        return self.q[:b], blocks, table[:b], lengths[:b]

    def expected(self, ragged: bool, causal: bool) -> tuple[jax.Array, jax.Array]:
        if (ragged, causal) not in self._expected:
            self._expected[ragged, causal] = reference(
                *self.arguments(ragged), causal=causal, **self.options
            )
        return self._expected[ragged, causal]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def make_queries(seed: int, shape: tuple[int, ...], dtype: str) -> jax.Array:
    return _normal(seed, shape, dtype) * jnp.asarray(cases.QUERY_SCALE, dtype)


def make_rows(seed: int, shape: tuple[int, ...], dtype: str) -> jax.Array:
    return _normal(seed, shape, dtype) * jnp.asarray(cases.ROW_SCALE, dtype)


def _normal(seed: int, shape: tuple[int, ...], dtype: str) -> jax.Array:
    return jax.random.normal(jax.random.key(cases.SEED + seed), shape, dtype)


@functools.lru_cache(maxsize=2)
def _cache(
    s_k: int, h_kv: int, b: int, zero_lengths: bool, dtype: str, format: str, ragged: bool
) -> tuple[jax.Array, np.ndarray, np.ndarray]:
    case = cases.DecodeCase(b, 1, s_k, 1, ragged=ragged, zero_lengths=zero_lengths)
    lengths = cases.make_lengths(case)
    table, num_blocks = cases.make_table(lengths, BLOCK_SIZE, case.max_blocks)
    used = np.zeros((num_blocks, BLOCK_SIZE), bool)
    for row, length in zip(table, lengths, strict=True):
        token = np.arange(length)
        used[row[token // BLOCK_SIZE], token % BLOCK_SIZE] = True
    blocks = make_rows(2, (num_blocks, BLOCK_SIZE, h_kv, 576), dtype)
    poison: float | int = jnp.nan
    if format != "dense":
        blocks, poison = coded(CacheFormat(name=format, dtype=dtype), blocks), 0xFF
    return jnp.where(used[:, :, None, None], blocks, poison).astype(blocks.dtype), table, lengths


@functools.partial(jax.jit, static_argnums=0)
def coded(format: CacheFormat, rows: jax.Array) -> jax.Array:
    """Rows [..., d_qk] as the bytes [..., bytes] of a format of one plane."""
    (plane,) = quantise.quantise(format, rows, kv_scale=scale_of(format))
    return plane


@jax.jit
def _compare(got: tuple, expected: tuple, again: tuple) -> tuple[jax.Array, jax.Array]:
    """Of each result whether it is close to the first sequences of what is expected, as
    tolerances.assert_close holds it, and whether a rerun has the same bits."""
    close = [
        _is_close(x, y[: len(x)], tolerance)
        for x, y, tolerance in zip(got, expected, TOLERANCES, strict=True)
    ]
    return jnp.stack(close), jnp.stack([jnp.array_equal(*x) for x in zip(got, again, strict=True)])


def _is_close(got: jax.Array, expected: jax.Array, tolerance: Tolerance) -> jax.Array:
    got, expected = got.astype(jnp.float32), expected.astype(jnp.float32)
    finite = jnp.isfinite(expected)
    bound = jnp.maximum(tolerance.absolute, tolerance.relative * jnp.abs(expected))
    close = jnp.where(finite, jnp.abs(got - expected) <= bound, got == expected).all()
    if tolerance.cosine is None:
        return close
    size = jnp.sum(got**2 + expected**2)
    distance = jnp.sum((got - expected) ** 2) / jnp.maximum(size, 1e-30)
    return close & (distance <= tolerance.cosine)


def assert_close(got: tuple, expected: tuple, again: tuple | None = None) -> None:
    """`expected` may be of more sequences."""
    got, expected = tuple(got), tuple(expected)
    close, equal = _compare(got, expected, got if again is None else tuple(again))
    if not close.all():
        for name, x, y, tolerance in zip(("out", "lse"), got, expected, TOLERANCES, strict=True):
            tolerances.assert_close(name, np.asarray(x), np.asarray(y)[: len(x)], tolerance)
        raise AssertionError("not close on the device, close on the host")
    assert equal.all(), "not the same bits on a rerun"


def assert_case(group: Group, ragged: bool, causal: bool, b: int) -> None:
    arguments = group.arguments(ragged, b)
    run = functools.partial(kernel, *arguments, causal=causal, **group.options)
    assert_close(run(), group.expected(ragged, causal), run())
