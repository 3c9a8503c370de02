// The element types of q, cache and out, to and from float, and the choice between them. Bit
// arithmetic rather than compiler types, so that it builds everywhere and is right where denormals
// are flushed, as on XLA's threads. Shared by cpu/ and sm90/.
#pragma once

#include <cstdint>
#include <cstring>

#include "host_device.h"
#include "params/dtype.h"

namespace flashmla {

FLASHMLA_HOST_DEVICE inline float float_of_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

FLASHMLA_HOST_DEVICE inline uint32_t bits_of_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

struct BFloat16 {
  static constexpr float kMax = 0x1.fep127f;  // the largest finite value
  uint16_t bits;

  FLASHMLA_HOST_DEVICE static float to_float(BFloat16 x) {
    return float_of_bits(uint32_t{x.bits} << 16);
  }

  FLASHMLA_HOST_DEVICE static BFloat16 from_float(float value) {  // to nearest, ties to even
    const uint32_t bits = bits_of_float(value);
    if ((bits & 0x7fffffff) > 0x7f800000)
      return {static_cast<uint16_t>((bits >> 16) | 0x40)};  // NaN
    return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
  }
};

struct Float16 {
  static constexpr float kMax = 65504.0f;
  uint16_t bits;

  FLASHMLA_HOST_DEVICE static float to_float(Float16 x) {
    const uint32_t sign = uint32_t{x.bits & 0x8000u} << 16;
    uint32_t magnitude = uint32_t{x.bits & 0x7fffu} << 13;
    if (magnitude >= 0x0f800000) {  // infinity, NaN
      return float_of_bits(sign | magnitude | 0x7f800000);
    }
    if (magnitude < 0x00800000) {  // zero, denormal: borrow the implicit one, then take it off
      const float value = float_of_bits(magnitude + 0x38800000) - float_of_bits(0x38800000);
      return float_of_bits(sign | bits_of_float(value));
    }
    return float_of_bits(sign | (magnitude + 0x38000000));  // exponent bias 15 to 127
  }

  FLASHMLA_HOST_DEVICE static Float16 from_float(float value) {  // to nearest, ties to even
    const uint32_t sign = bits_of_float(value) & 0x80000000;
    uint32_t magnitude = bits_of_float(value) ^ sign;
    uint32_t half;
    if (magnitude > 0x7f800000) {
      half = 0x7e00;  // NaN
    } else if (magnitude >= 0x477ff000) {
      half = 0x7c00;                      // rounds past 65504
    } else if (magnitude < 0x38800000) {  // denormal: 0.5 aligns its last bit with the float's
      half = bits_of_float(float_of_bits(magnitude) + 0.5f) - 0x3f000000;
    } else {
      magnitude += 0xc8000fff + ((magnitude >> 13) & 1);  // exponent bias 127 to 15, round
      half = magnitude >> 13;
    }
    return {static_cast<uint16_t>(half | (sign >> 16))};
  }
};

struct Float32 {
  static constexpr float kMax = 0x1.fffffep127f;
  float value;

  FLASHMLA_HOST_DEVICE static float to_float(Float32 x) { return x.value; }
  FLASHMLA_HOST_DEVICE static Float32 from_float(float value) { return {value}; }
};

// body(Element{}) with the struct that stands for dtype.
template <class Body>
void with_element(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kBFloat16:
      return body(BFloat16{});
    case DType::kFloat16:
      return body(Float16{});
    case DType::kFloat32:
      return body(Float32{});
  }
}

}  // namespace flashmla
