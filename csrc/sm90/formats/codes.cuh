// e4m3 codes to 16 bit.
//
// Keys become f16: one instruction for two codes, exact, NaN too; then a multiplication by their
// group's scale relative to the token's largest (token_exponent), which the scores in f32 are
// multiplied with. What of a key is below 2^-33 of the token's largest code * scale is lost; f32
// sums lose it too.
//
// Values become bf16, as outputs need each group's own range. The bits of a code, moved to bf16's
// sign, low exponent and high mantissa bits, are the code's value times 2^-120, subnormals
// included; one multiplication by 2^120 * scale then gives what bf16(code) * bf16(scale) gives.
// That factor is finite for scales up to 2^7 only: where a tile has larger ones, the rest of the
// scale is multiplied in by itself. NaN codes (0x7f, 0xff) become
// +-480 * scale.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace flashmla::sm90 {

constexpr float kLargestScale = 128.0f;  // that takes one multiplication
constexpr float kPlaced = 0x1p120f;      // what placed codes are to be multiplied with

// Selectors of two bytes of four: each to the low byte of a half, its sign to the high byte.
constexpr uint32_t kBytes02 = 0xA280, kBytes13 = 0xB391, kBytes01 = 0x9180, kBytes23 = 0xB3A2;

template <uint32_t kBytes>
__device__ __forceinline__ uint32_t place_codes(uint32_t codes, uint32_t after = 0) {
  uint32_t spread;
  asm("prmt.b32 %0, %1, %3, %2;" : "=r"(spread) : "r"(codes), "n"(kBytes), "r"(after));
  return (spread << 4) & 0x87f087f0;
}

__device__ __forceinline__ uint32_t multiply_bf16x2(uint32_t a, uint32_t b) {
  uint32_t product;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
  return product;
}

// Sixteen codes to bf16, times a factor.
__device__ __forceinline__ void place_piece(uint32_t (&columns)[8], const uint4& codes,
                                            uint32_t factor) {
  const uint32_t v[4] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    columns[2 * i] = multiply_bf16x2(place_codes<kBytes01>(v[i]), factor);
    columns[2 * i + 1] = multiply_bf16x2(place_codes<kBytes23>(v[i]), factor);
  }
}

// An upper bit of a byte says that one of sixteen codes is NaN: adding 1 changes it of 0x7f and
// 0xff, and what these carry changes others' besides.
__device__ __forceinline__ uint32_t any_nan(const uint4& codes) {
  const auto changed = [](uint32_t v) { return v ^ (v + 0x01010101); };
  return changed(codes.x) | changed(codes.y) | changed(codes.z) | changed(codes.w);
}

// Two codes, the lower or the upper half of four, to f16.
template <bool kUpper>
__device__ __forceinline__ uint32_t codes_to_f16(uint32_t codes) {
  uint32_t values;
  if constexpr (kUpper) {
    asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %1;\ncvt.rn.f16x2.e4m3x2 %0, high;\n}"
        : "=r"(values)
        : "r"(codes));
  } else {
    asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %1;\ncvt.rn.f16x2.e4m3x2 %0, low;\n}"
        : "=r"(values)
        : "r"(codes));
  }
  return values;
}

__device__ __forceinline__ uint32_t multiply_f16x2(uint32_t a, uint32_t b) {
  uint32_t product;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
  return product;
}

// f16(x) in both halves.
__device__ __forceinline__ uint32_t f16_twice(float x) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %1;" : "=r"(packed) : "f"(x));
  return packed;
}

// The power of two to which a token's scales are relative: of the largest, but at least 2^-20, so
// that the rope, which is divided by it too, does not overflow. Below that, scores are close to 0.
__device__ __forceinline__ int token_exponent(float largest_scale) {
  return min(max((__float_as_int(largest_scale) >> 23) - 127, -20), 126);
}

// bf16(x) in both halves.
__device__ __forceinline__ uint32_t bf16_twice(float x) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %1;" : "=r"(packed) : "f"(x));
  return packed;
}

__device__ __forceinline__ float load_scale(uint32_t address) {
  float scale;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(scale) : "r"(address) : "memory");
  return scale;
}

// True for NaN too.
__device__ __forceinline__ bool is_large(float scale) { return !(fabsf(scale) <= kLargestScale); }

// The first factor of a scale, and the second one.
__device__ __forceinline__ float clamp_scale(float scale) {
  return fminf(fmaxf(scale, -kLargestScale), kLargestScale);
}
__device__ __forceinline__ float excess_of(float scale) {
  return is_large(scale) ? fabsf(scale) * (1 / kLargestScale) : 1.0f;
}

}  // namespace flashmla::sm90
