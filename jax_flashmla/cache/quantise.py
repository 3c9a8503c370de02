"""From rows to the bytes of a cache format and back: the definition that kernels are held to.

A group's scale is the least power of two that is at least max(amax / 448, 1e-4), for "fp8_index"
max(amax, 1e-4) / 448, where amax is the largest magnitude of the group's columns; for "v41_fp4" it
is e4m3(amax / 6), at least 2^-9. A code is value / scale, to nearest even, saturating. Infinities
count as the largest finite value of the rows' dtype. A NaN has no part in amax and becomes the code
0x7f; e2m1 has no NaN, so that there a NaN makes its group's scale NaN. Columns without codes are
rounded to bfloat16, NaN to 0x7fc0. csrc/quantise.h says the same, bit for bit.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_flashmla import _checks
from jax_flashmla.cache.format import CacheFormat


class Coding(NamedTuple):
    """What a token's bytes are: codes, their scales, then the other columns as bfloat16."""

    codes: int  # columns stored as codes: e4m3; with e4m3 scales e2m1, the even in the low nibble
    group: int  # columns that share a scale
    scale: str  # "cache" (one for the cache, given apart), "f32", "e8m0" or "e4m3"
    least_exponent: int = -13  # of a group's scale: 2^-13 is the least power of two above 1e-4


CODINGS = {  # layout_of in csrc/formats.h
    "v32": Coding(512, 128, "f32"),
    "v32_nope": Coding(512, 128, "f32"),
    "v4": Coding(448, 64, "e8m0"),
    "v41": Coding(512, 32, "e8m0"),
    "v41_fp4": Coding(512, 16, "e4m3"),
    "fp8_row": Coding(576, 576, "cache"),
    "fp8_index": Coding(128, 128, "f32", -22),  # 1e-4 / 448
}
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def quantise(
    format: CacheFormat, rows: jax.Array, *, kv_scale: jax.Array | float | None = None
) -> tuple[jax.Array, ...]:
    """The bytes of rows in a format.

    Args:
        format: any but "dense".
        rows: [..., d_qk], bfloat16, float16 or float32.
        kv_scale: of "fp8_row": a code is row / kv_scale, in float32; by default 1.

    Returns:
        One array uint8 [..., bytes] for each plane. Padding is 0.

    Raises:
        ValueError, TypeError: an argument is not as described.
    """
    _coding(format)
    _check_columns("rows", rows, "[..., d_qk]", format.d_qk, _checks.CACHE_DTYPES)
    return encode(format, jnp.asarray(rows), _checks.as_kv_scale(kv_scale, format.name))


def encode(format: CacheFormat, rows: jax.Array, kv_scale: jax.Array) -> tuple[jax.Array, ...]:
    """quantise of checked arguments."""
    coding = _coding(format)
    largest = float(jnp.finfo(rows.dtype).max)
    x = rows.astype(jnp.float32)
    coded = jnp.clip(x[..., : coding.codes], -largest, largest)
    groups = coded.reshape(*coded.shape[:-1], coding.codes // coding.group, coding.group)
    scales: list[jax.Array] = []
    if coding.scale == "cache":
        codes = e4m3_codes(groups / kv_scale)
    elif coding.scale == "e4m3":
        amax = _float(jnp.max(_magnitude(groups), axis=-1))
        scale_codes = jnp.maximum(e4m3_codes(amax * jnp.float32(1 / 6)), 1)
        scales = [scale_codes]
        codes = _e2m1_codes(groups, _e4m3_values(scale_codes)[..., None])
    else:
        exponent = _scale_exponent(coding, groups)
        scales = [
            (exponent + 127).astype(jnp.uint8)
            if coding.scale == "e8m0"
            else _to_bytes(_power_of_two(exponent))
        ]
        codes = e4m3_codes(groups * _power_of_two(-exponent)[..., None])
    codes = codes.reshape(coded.shape)
    if coding.scale == "e4m3":
        codes = codes[..., 0::2] | codes[..., 1::2] << 4
    rope = [_to_bytes(_bf16_bits(x[..., coding.codes :]))] if format.d_qk > coding.codes else []
    if len(format.planes) == 1:
        return (jnp.concatenate([codes, *scales, *rope], axis=-1),)
    pad = jnp.zeros((*x.shape[:-1], format.planes[1] - scales[0].shape[-1]), jnp.uint8)
    return (jnp.concatenate([codes, *rope], axis=-1), jnp.concatenate([*scales, pad], axis=-1))


def dequantise(
    format: CacheFormat,
    planes: tuple[jax.Array, ...],
    *,
    kv_scale: jax.Array | float | None = None,
) -> jax.Array:
    """The rows of bytes in a format. A value is code * scale in float32, rounded to the dtype.

    Args:
        format: any but "dense".
        planes: the arrays that `quantise` returns: uint8 [..., bytes] for each plane.
        kv_scale: as for `quantise`.

    Returns:
        Rows [..., d_qk] of `format.dtype`.

    Raises:
        ValueError, TypeError: an argument is not as described.
    """
    _coding(format)
    if not isinstance(planes, tuple | list) or len(planes) != len(format.planes):
        raise TypeError(
            f"planes must be a tuple of {len(format.planes)} arrays in format {format.name!r}, got "
            f"{_checks.describe(planes)}"
        )
    for i, (plane, size) in enumerate(zip(planes, format.planes, strict=True)):
        _check_columns(f"planes[{i}]", plane, "[..., bytes]", size, (np.dtype(np.uint8),))
        if plane.shape[:-1] != planes[0].shape[:-1]:
            raise ValueError(
                f"planes[{i}] must be of as many tokens as planes[0], {planes[0].shape[:-1]}, got "
                f"shape {plane.shape}"
            )
    scale = _checks.as_kv_scale(kv_scale, format.name)
    values = dequantise_f32(format, tuple(map(jnp.asarray, planes)))
    return (values * scale if format.name == "fp8_row" else values).astype(format.dtype)


def dequantise_f32(format: CacheFormat, planes: tuple[jax.Array, ...]) -> jax.Array:
    """The values of `dequantise` in float32; of "fp8_row" the codes, which kernels scale later."""
    coding = _coding(format)
    shape = planes[0].shape[:-1]
    code_bytes = coding.codes // 2 if coding.scale == "e4m3" else coding.codes
    codes, rest = planes[0][..., :code_bytes], planes[0][..., code_bytes:]
    if coding.scale == "cache":
        return _e4m3_values(codes)
    if coding.scale == "e4m3":
        nibbles = jnp.stack([codes & 15, codes >> 4], axis=-1).reshape(*shape, coding.codes)
        table = jnp.array([*_E2M1, *(-x for x in _E2M1)], jnp.float32)
        values = table[nibbles.astype(jnp.int32)]
    else:
        values = _e4m3_values(codes)
    groups = coding.codes // coding.group
    scale_bytes = groups * (4 if coding.scale == "f32" else 1)
    if len(planes) == 1:
        scales, rest = rest[..., :scale_bytes], rest[..., scale_bytes:]
    else:
        scales = planes[1][..., :scale_bytes]
    scaled = values.reshape(*shape, groups, coding.group) * _scale_values(coding, scales)[..., None]
    row = scaled.reshape(*shape, coding.codes)
    if format.d_qk > coding.codes:
        rope = _from_bytes(rest[..., : 2 * (format.d_qk - coding.codes)], jnp.bfloat16)
        row = jnp.concatenate([row, rope.astype(jnp.float32)], axis=-1)
    return row.astype(format.dtype).astype(jnp.float32)


def _check_columns(
    name: str, x: Any, dims: str, columns: int, dtypes: tuple[np.dtype, ...]
) -> None:
    """That it is an array of any rank with so many columns."""
    _checks.refuse_foreign(name, x, dims)
    _checks.refuse_deleted(name, x)
    if x.shape[-1:] != (columns,):
        raise ValueError(f"{name} must be {dims} of {columns} columns, got shape {x.shape}")
    if x.dtype not in dtypes:
        raise TypeError(f"{name} must have dtype {_checks.dtype_names(dtypes)}, got {x.dtype}")


def _coding(format: Any) -> Coding:
    if not isinstance(format, CacheFormat):
        raise TypeError(f"format must be a CacheFormat, got {_checks.describe(format)}")
    if format.name not in CODINGS:
        raise ValueError(
            f"format must be {_checks.one_of(CODINGS)}, got {format.name}: its rows are stored as "
            "they are"
        )
    return CODINGS[format.name]


def e4m3_codes(x: jax.Array) -> jax.Array:
    """float8_e4m3fn of float32, to nearest even, saturating at 448; NaN is 0x7f."""
    bits = _bits(x)
    magnitude = bits & 0x7FFFFFFF
    finite = jnp.minimum(magnitude, jnp.uint32(0x43E00000))
    # A denormal's last bit, 2^-9, is aligned with the float's by adding 2^14.
    denormal = _bits(_float(finite) + 2.0**14) - jnp.uint32(0x46800000)
    normal = (finite - jnp.uint32(0x3C000000) + 0x7FFFF + (finite >> 20 & 1)) >> 20
    code = jnp.where(finite < 0x3C800000, denormal, normal) | (bits >> 24 & 0x80)
    return jnp.where(magnitude > 0x7F800000, jnp.uint32(0x7F), code).astype(jnp.uint8)


def _e2m1_codes(x: jax.Array, scale: jax.Array) -> jax.Array:
    """Nibbles of x / scale: how many of the middles between codes lie below, ties to even."""
    magnitude = jnp.abs(x)
    code = jnp.where(_bits(x) >> 31 == 1, jnp.uint8(8), jnp.uint8(0))
    for below, middle in enumerate((0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)):
        bound = scale * middle
        above = magnitude >= bound if below % 2 else magnitude > bound
        code += above.astype(jnp.uint8)
    return code


def _scale_exponent(coding: Coding, groups: jax.Array) -> jax.Array:
    """Of the least power of two that is at least amax / 448 and the format's least scale."""
    amax = jnp.max(jnp.where(jnp.isnan(groups), jnp.uint32(0), _magnitude(groups)), axis=-1)
    # 448 = 1.75 * 2^8: one more where amax's significand is above 1.75.
    exponent = (amax.astype(jnp.int32) + 0x1FFFFF >> 23) - (127 + 8)
    return jnp.maximum(exponent, coding.least_exponent)


def _scale_values(coding: Coding, scales: jax.Array) -> jax.Array:
    if coding.scale == "f32":
        return _from_bytes(scales, jnp.float32)
    if coding.scale == "e4m3":
        return _e4m3_values(scales)
    bits = jnp.where(scales == 0, jnp.uint32(0x00400000), scales.astype(jnp.uint32) << 23)
    return _float(jnp.where(scales == 255, jnp.uint32(0x7FC00000), bits))


def _e4m3_values(codes: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(codes, jnp.float8_e4m3fn).astype(jnp.float32)


def _bf16_bits(x: jax.Array) -> jax.Array:
    # In integers: conversion instructions may flush denormals.
    bits = _bits(x)
    rounded = bits + 0x7FFF + (bits >> 16 & 1) >> 16
    return jnp.where(jnp.isnan(x), jnp.uint32(0x7FC0), rounded).astype(jnp.uint16)


def _magnitude(x: jax.Array) -> jax.Array:
    """Bits that compare as |x| does, NaN above infinity."""
    return _bits(x) & 0x7FFFFFFF


def _power_of_two(exponent: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)


def _bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.uint32)


def _float(bits: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _to_bytes(x: jax.Array) -> jax.Array:
    size = x.shape[-1] * x.dtype.itemsize
    return jax.lax.bitcast_convert_type(x, jnp.uint8).reshape(*x.shape[:-1], size)


def _from_bytes(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    size = jnp.dtype(dtype).itemsize
    return jax.lax.bitcast_convert_type(x.reshape(*x.shape[:-1], -1, size), dtype)
