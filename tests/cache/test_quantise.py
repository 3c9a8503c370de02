"""quantise and dequantise against an implementation in NumPy, bit for bit."""

from __future__ import annotations

import functools
import math
import os

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jax_flashmla import CacheFormat
from jax_flashmla.cache import quantise as q

pytestmark = pytest.mark.usefixtures("on_cpu")

NAMES = ("v32", "v32_nope", "v4", "v41", "v41_fp4", "fp8_row", "fp8_index")
DTYPES = ("bfloat16", "float16", "float32")
E4M3, E2M1 = ml_dtypes.float8_e4m3fn, ml_dtypes.float4_e2m1fn
KV_SCALE = 0.37
# As users compile it, whatever the other tests leave out: here every bit counts.
OPTIMISED = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
if "xla_cpu_use_fusion_emitters" in os.environ.get("XLA_FLAGS", ""):  # in conftest.py
    OPTIMISED["xla_cpu_use_fusion_emitters"] = True


def e4m3(x: np.ndarray) -> np.ndarray:
    """Codes of float32, saturating."""
    codes = np.clip(x, -448, 448).astype(E4M3).view(np.uint8)
    return np.where(np.isnan(x), np.uint8(0x7F), codes)


def power_scale(amax: float, least: float) -> float:
    """The least power of two that is at least max(amax / 448, least)."""
    fraction, exponent = math.frexp(max(amax / 448, least))  # in float64, exact enough: see below
    scale = math.ldexp(1.0, exponent - 1 if fraction == 0.5 else exponent)
    assert scale >= least
    # Without the quotient's rounding.
    assert scale * 448 >= amax
    assert scale / 2 < least or scale / 2 * 448 < amax
    return scale


def expected_planes(name: str, row: np.ndarray) -> list[np.ndarray]:
    """The bytes of one row, a group at a time."""
    columns, group = {
        "v32": (512, 128),
        "v32_nope": (512, 128),
        "v4": (448, 64),
        "v41": (512, 32),
        "v41_fp4": (512, 16),
        "fp8_row": (576, 576),
        "fp8_index": (128, 128),
    }[name]
    largest = float(ml_dtypes.finfo(row.dtype).max)
    x = row.astype(np.float32)
    codes, scales = [], []
    for begin in range(0, columns, group):
        part = np.clip(x[begin : begin + group], -largest, largest)
        amax = float(np.max(np.abs(part), initial=0, where=~np.isnan(part)))
        if name == "fp8_row":
            codes.append(e4m3(part / np.float32(KV_SCALE)))
        elif name == "v41_fp4":
            scale_code = max(e4m3(np.float32(amax) * np.float32(1 / 6)), np.uint8(1))
            if np.isnan(part).any():
                scale_code, part = np.uint8(0x7F), np.copysign(0, part)
            scale = np.abs(np.nan_to_num(np.array(scale_code).view(E4M3).astype(np.float64), nan=1))
            nibbles = np.clip(part / scale, -6, 6).astype(E2M1).view(np.uint8)
            codes.append(nibbles[0::2] | nibbles[1::2] << 4)
            scales.append(np.atleast_1d(scale_code))
        else:
            scale = power_scale(amax, 1e-4 / 448 if name == "fp8_index" else 1e-4)
            codes.append(e4m3(part * np.float32(1 / scale)))
            kind = ml_dtypes.float8_e8m0fnu if name in ("v4", "v41") else np.float32
            scales.append(np.array([scale]).astype(kind).view(np.uint8))
    rope = np.where(np.isnan(x[columns:]), np.float32(np.nan), x[columns:])
    rope = rope.astype(ml_dtypes.bfloat16).view(np.uint16)
    rope = np.where(np.isnan(x[columns:]), np.uint16(0x7FC0), rope).view(np.uint8)
    if name == "v4":
        return [np.concatenate([*codes, rope]), np.concatenate([*scales, np.zeros(1, np.uint8)])]
    if name == "fp8_index":
        return [np.concatenate(codes), np.concatenate(scales)]
    return [np.concatenate([*codes, *scales, rope])]


@functools.cache
def jitted(name: str):
    format = CacheFormat(name=name)
    kv_scale = jnp.float32(KV_SCALE) if name == "fp8_row" else None
    quantise = functools.partial(q.quantise, format, kv_scale=kv_scale)
    return jax.jit(quantise, compiler_options=OPTIMISED)


def check(name: str, rows: np.ndarray) -> None:
    with np.errstate(all="ignore"):
        expected = [
            np.stack(plane) for plane in zip(*(expected_planes(name, r) for r in rows), strict=True)
        ]
    got = jitted(name)(jnp.asarray(rows))
    for x, y in zip(got, expected, strict=True):
        assert x.dtype == jnp.uint8
        np.testing.assert_array_equal(np.asarray(x), y)


def hostile_rows(columns: int, dtype: str) -> np.ndarray:
    rng = np.random.default_rng(0)
    k = np.arange(-12, 12, dtype=np.float64)
    rows = [rng.standard_normal(columns) * 2.0**e for e in (*range(-24, 16), 60, 120)]
    rows += [np.zeros(columns), np.full(columns, -0.0), np.full(columns, np.nan)]
    rows += [
        np.full(columns, np.inf),
        np.full(columns, 1e-40),
        np.exp2(rng.integers(-20, 15, columns)),
    ]
    for edge in (
        448,
        448 * (1 + 2.0**-7),
        448 * (1 - 2.0**-8),
        448 * (1 + 2.0**-22),
        464,
        480,
        6,
        7,
    ):
        for power in k[::4]:
            row = rng.uniform(-1, 1, columns) * edge * 2.0**power
            row[:: columns // 8] = edge * 2.0**power
            rows.append(row)
    for bad in (np.nan, np.inf, -np.inf, 3e38, -1e-45):
        row = rng.standard_normal(columns)
        row[rng.random(columns) < 0.02] = bad
        rows.append(row)
    with np.errstate(all="ignore"):
        return (
            np.stack(rows)
            .astype(np.float32)
            .astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_bytes_are_those_of_a_plain_loop(name: str, dtype: str) -> None:
    check(name, hostile_rows(CacheFormat(name=name).d_qk, dtype))


@settings(max_examples=20)
@given(
    name=st.sampled_from(NAMES),
    dtype=st.sampled_from(["bfloat16", "float16"]),
    bits=hnp.arrays(np.uint16, (2, 576), elements=st.integers(0, 2**16 - 1)),
)
def test_any_bits(name: str, dtype: str, bits: np.ndarray) -> None:
    check(name, bits[:, : CacheFormat(name=name).d_qk].view(jnp.dtype(dtype)))


def test_every_16_bit_number() -> None:
    numbers = np.arange(2**16, dtype=np.uint16).reshape(-1, 512)
    for dtype in ("bfloat16", "float16"):
        check("v41", numbers.view(jnp.dtype(dtype)))
        check("v41_fp4", numbers.view(jnp.dtype(dtype)))


def test_every_code_is_read_as_it_is() -> None:
    codes = np.arange(256, dtype=np.uint8)
    format = CacheFormat(name="fp8_row")
    row = np.resize(codes, 576)
    got = np.asarray(q.dequantise(format, (jnp.asarray(row),)), np.float32)
    np.testing.assert_array_equal(got, row.view(E4M3).astype(np.float32))
    row = np.concatenate([np.resize(codes, 256), np.full(32, 0x38, np.uint8)])  # scales of 1
    got = np.asarray(q.dequantise(CacheFormat(name="v41_fp4"), (jnp.asarray(row),)), np.float32)
    nibbles = np.stack([codes & 15, codes >> 4], axis=-1).reshape(-1)
    np.testing.assert_array_equal(got, nibbles.view(E2M1).astype(np.float32))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_values_are_rounded_once_to_the_dtype_whatever_the_scales(dtype: str) -> None:
    rng = np.random.default_rng(1)
    codes = rng.integers(0, 256, 512).astype(np.uint8)
    scales = np.array([0.3, -1e3, np.nan, 3e-5], np.float32)
    rope = rng.standard_normal(64).astype(ml_dtypes.bfloat16)
    row = np.concatenate([codes, scales.view(np.uint8), rope.view(np.uint8)])
    got = q.dequantise(CacheFormat(name="v32", dtype=dtype), (jnp.asarray(row),))
    assert got.dtype == dtype
    with np.errstate(all="ignore"):
        values = codes.view(E4M3).astype(np.float32) * np.repeat(scales, 128)
        expected = np.concatenate([values, rope.astype(np.float32)]).astype(got.dtype)
    as_float = lambda x: np.asarray(x, np.float32)  # noqa: E731  # NaN equals NaN
    np.testing.assert_array_equal(as_float(got), as_float(expected))


@pytest.mark.parametrize("name", NAMES)
def test_there_and_back_is_near_and_the_second_time_exact(name: str) -> None:
    format = CacheFormat(name=name)
    rows = np.random.default_rng(2).standard_normal((3, 5, format.d_qk)).astype(jnp.bfloat16)
    kv_scale = jnp.float32(1 / 64) if name == "fp8_row" else None
    quantise = jax.jit(functools.partial(q.quantise, format))
    dequantise = jax.jit(functools.partial(q.dequantise, format))
    once = dequantise(quantise(rows, kv_scale=kv_scale), kv_scale=kv_scale)
    assert once.shape == rows.shape
    bound = 0.36 if name == "v41_fp4" else 2.0**-4
    x, y = np.asarray(once, np.float32), rows.astype(np.float32)
    amax = np.abs(y).max()
    assert (np.abs(x - y) <= bound * np.maximum(np.abs(y), amax / 8)).all()
    if name != "v41_fp4":  # its scale follows amax, which is rounded
        twice = dequantise(quantise(once, kv_scale=kv_scale), kv_scale=kv_scale)
        np.testing.assert_array_equal(np.asarray(twice), np.asarray(once))


def test_under_vmap() -> None:
    format = CacheFormat(name="v4")
    rows = jnp.asarray(hostile_rows(512, "bfloat16"))
    for x, y in zip(jax.vmap(jitted("v4"))(rows), jitted("v4")(rows), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
    assert format.planes == (576, 8)


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match=r"format must be v32, .* got dense"):
        q.quantise(CacheFormat(), jnp.zeros((1, 576), jnp.bfloat16))
    with pytest.raises(
        ValueError, match=r"rows must be \[\.\.\., d_qk\] of 576 columns, got shape"
    ):
        q.quantise(CacheFormat(name="v32"), jnp.zeros((1, 512), jnp.bfloat16))
    with pytest.raises(TypeError, match="rows must have dtype"):
        q.quantise(CacheFormat(name="v32"), jnp.zeros((1, 576), jnp.int32))
    with pytest.raises(TypeError, match=r"rows must be an array .* got None"):
        q.quantise(CacheFormat(name="v32"), None)
    with pytest.raises(TypeError, match="format must be a CacheFormat, got 'v32' of type str"):
        q.quantise("v32", jnp.zeros((1, 576), jnp.bfloat16))
    with pytest.raises(ValueError, match='kv_scale must be None but in format "fp8_row"'):
        q.quantise(CacheFormat(name="v32"), jnp.zeros((1, 576), jnp.bfloat16), kv_scale=2.0)
    with pytest.raises(ValueError, match="kv_scale must be finite in float32, got inf"):
        q.quantise(CacheFormat(name="fp8_row"), np.zeros((1, 576), np.float32), kv_scale=np.inf)


PLANE, LONG, SHORT = (jnp.zeros((3, n), jnp.uint8) for n in (656, 576, 8))


@pytest.mark.parametrize(
    ("name", "planes", "kv_scale", "error", "message"),
    [
        (
            "v32",
            PLANE,
            None,
            TypeError,
            r"planes must be a tuple of 1 .* got an array uint8\[3, 656\]",
        ),
        ("v32", (PLANE, PLANE), None, TypeError, r"planes must be a tuple of 1 .* got \(an array"),
        ("v4", (LONG,), None, TypeError, "planes must be a tuple of 2 arrays in format 'v4'"),
        ("v4", (SHORT, LONG), None, ValueError, r"planes\[0\] must be .* of 576 columns"),
        ("v4", (LONG, SHORT[:2]), None, ValueError, r"planes\[1\] must be of as many tokens"),
        (
            "v32",
            (PLANE[:, :-1],),
            None,
            ValueError,
            r"planes\[0\] .* 656 columns, got shape \(3, 655",
        ),
        ("v32", (PLANE.astype(jnp.int8),), None, TypeError, "must have dtype uint8, got int8"),
        ("v32", (PLANE,), 2.0, ValueError, 'kv_scale must be None but in format "fp8_row"'),
        ("dense", (PLANE,), None, ValueError, "format must be v32, .* got dense"),
    ],
)
def test_what_is_no_plane_is_refused(name, planes, kv_scale, error, message) -> None:
    with pytest.raises(error, match=message):
        q.dequantise(CacheFormat(name=name), planes, kv_scale=kv_scale)
