// From rows to the codes and scales of a format, a group of columns at a time: what cache_append
// stores, on the host and on the device, bit for bit what jax_flashmla/cache/quantise.py defines.
//   Group scales that are powers of two: the least 2^k >= max(amax / 448, 1e-4), or for index keys
//   max(amax, 1e-4) / 448. e4m3 scales: e4m3(amax * (1 / 6)), at least 2^-9.
//   Codes: value / scale, to nearest even, saturating. Infinities count as the largest finite value
//   of the rows' type. A NaN has no part in amax and becomes the code 0x7f; e2m1 has no such code,
//   there a NaN makes the group's scale NaN.
//   Rotary columns: bf16, to nearest even; a NaN becomes 0x7fc0.
#pragma once

#include <cstdint>

#include "elements.h"
#include "formats.h"
#include "host_device.h"

namespace flashmla {

FLASHMLA_HOST_DEVICE inline float power_of_two(int exponent) {  // in [-126, 127]
  return float_of_bits(static_cast<uint32_t>(exponent + 127) << 23);
}

FLASHMLA_HOST_DEVICE inline float e4m3_to_float(uint8_t code) {
  const uint32_t sign = (code & 0x80u) << 24;
  const uint32_t magnitude = (code & 0x7fu) << 20;
  if (magnitude == 0x07f00000) return float_of_bits(0x7fc00000);
  if (magnitude < 0x00800000) {  // zero, denormal: borrow the implicit one, then take it off
    const float value = float_of_bits(magnitude + 0x3c800000) - float_of_bits(0x3c800000);
    return float_of_bits(sign | bits_of_float(value));
  }
  return float_of_bits(sign | (magnitude + 0x3c000000));  // exponent bias 7 to 127
}

FLASHMLA_HOST_DEVICE inline uint8_t e4m3_from_float(float value) {
  const uint32_t bits = bits_of_float(value);
  uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return 0x7f;             // NaN
  if (magnitude > 0x43e00000) magnitude = 0x43e00000;  // 448
  uint32_t code;
  if (magnitude < 0x3c800000) {  // denormal: 2^14 aligns its last bit, 2^-9, with the float's
    code = bits_of_float(float_of_bits(magnitude) + 0x1p14f) - 0x46800000;
  } else {
    code = (magnitude - 0x3c000000 + 0x7ffff + ((magnitude >> 20) & 1)) >> 20;
  }
  return static_cast<uint8_t>(code | ((bits >> 24) & 0x80));
}

// e2m1 of value / scale, in the low nibble. scale times the middle of two codes is exact in f32.
FLASHMLA_HOST_DEVICE inline uint8_t e2m1_from_quotient(float value, float scale) {
  const float x = float_of_bits(bits_of_float(value) & 0x7fffffff);
  const int code = (x > 0.25f * scale) + (x >= 0.75f * scale) + (x > 1.25f * scale) +
                   (x >= 1.75f * scale) + (x > 2.5f * scale) + (x >= 3.5f * scale) +
                   (x > 5.0f * scale);
  return static_cast<uint8_t>(code | (bits_of_float(value) >> 28 & 8));
}

FLASHMLA_HOST_DEVICE inline float e2m1_to_float(uint8_t code) {  // of the low nibble
  const int exponent = code >> 1 & 3, mantissa = code & 1;
  const float magnitude =
      exponent == 0 ? 0.5f * mantissa : (1.0f + 0.5f * mantissa) * power_of_two(exponent - 1);
  return code & 8 ? -magnitude : magnitude;
}

template <class Element>
FLASHMLA_HOST_DEVICE float load_finite(Element from) {  // or NaN
  const float x = Element::to_float(from);
  return x > Element::kMax ? Element::kMax : x < -Element::kMax ? -Element::kMax : x;
}

FLASHMLA_HOST_DEVICE inline uint16_t rope_bits(float value) {
  return value == value ? BFloat16::from_float(value).bits : 0x7fc0;
}

// What a column adds to its group's amax: the bits of |value|, which compare as it does.
FLASHMLA_HOST_DEVICE inline uint32_t amax_bits(const FormatLayout& layout, float value) {
  if (value != value && layout.scale != ScaleType::kE4M3) return 0;
  return bits_of_float(value) & 0x7fffffff;
}

// The scale of a group.
struct GroupScale {
  float scale;
  float inverse;  // of powers of two
  uint32_t bits;  // as stored: an f32's, or a byte
};

FLASHMLA_HOST_DEVICE inline GroupScale group_scale(const FormatLayout& layout, uint32_t amax,
                                                   float kv_scale) {
  if (layout.scale == ScaleType::kCache) return {kv_scale, 0.0f, 0};
  if (layout.scale == ScaleType::kE4M3) {
    const uint8_t code = e4m3_from_float(float_of_bits(amax) * (1.0f / 6.0f));
    const uint8_t least = code > 1 ? code : 1;
    return {e4m3_to_float(least), 0.0f, least};
  }
  // 448 = 1.75 * 2^8: one more where amax's significand is above 1.75.
  const int exponent = static_cast<int>((amax + 0x1fffff) >> 23) - 127 - 8;
  const int least = layout.codes == 128 ? -22 : -13;  // 1e-4 / 448, 1e-4
  const int k = exponent > least ? exponent : least;
  const float scale = power_of_two(k);
  return {scale, power_of_two(-k),
          layout.scale == ScaleType::kE8M0 ? static_cast<uint32_t>(k + 127) : bits_of_float(scale)};
}

// A byte, or a nibble of kE4M3's formats.
FLASHMLA_HOST_DEVICE inline uint8_t encode(const FormatLayout& layout, const GroupScale& group,
                                           float value) {
  if (layout.scale == ScaleType::kE4M3) return e2m1_from_quotient(value, group.scale);
  if (layout.scale == ScaleType::kCache) return e4m3_from_float(value / group.scale);
  return e4m3_from_float(value * group.inverse);
}

}  // namespace flashmla
