// Sixteen columns of a row, from the bytes in which they lie to 16 bit.
//
// bf16: the bits of an e4m3 code, moved to bf16's sign, low exponent and high mantissa bits, are
// the code's value times 2^-120, subnormals included; one multiplication by 2^120 * scale gives
// what bf16(code) * bf16(scale) gives. That factor is finite for scales up to 2^7 only: what larger
// ones have more is multiplied in by itself. NaN codes would become +-480 * scale and are mended.
// f16: one instruction for two codes, NaN too. Scales above 2^15 count as 2^15.
// e2m1: three bits look up a value's bits.
#pragma once

#include "sm90/formats/codes.cuh"
#include "sm90/ptx/matrix.cuh"
#include "sm90/sparse_decode/wide/formats.cuh"

namespace flashmla::sm90::sparse::wide {

constexpr int kPieceColumns = 16;

__device__ __forceinline__ uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t bytes;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(a), "r"(b), "r"(selector));
  return bytes;
}

template <typename T>
__device__ __forceinline__ uint32_t multiply_pair(uint32_t a, uint32_t b) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>)
    return multiply_bf16x2(a, b);
  else
    return multiply_f16x2(a, b);
}

// Read once, and not kept in L1.
__device__ __forceinline__ uint4 load_16(const uint8_t* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}
__device__ __forceinline__ uint2 load_8(const uint8_t* p) {
  uint2 v;
  asm volatile("ld.global.nc.L1::no_allocate.v2.b32 {%0, %1}, [%2];"
               : "=r"(v.x), "=r"(v.y)
               : "l"(p));
  return v;
}
// kBytes: 1, 2 or 4.
template <int kBytes>
__device__ __forceinline__ uint32_t load_bytes(const uint8_t* p) {
  uint32_t v;
  if constexpr (kBytes == 4) {
    asm volatile("ld.global.nc.b32 %0, [%1];" : "=r"(v) : "l"(p));
  } else if constexpr (kBytes == 2) {
    asm volatile("{\n.reg .b16 v;\nld.global.nc.b16 v, [%1];\ncvt.u32.u16 %0, v;\n}"
                 : "=r"(v)
                 : "l"(p));
  } else {
    asm volatile("ld.global.nc.u8 %0, [%1];" : "=r"(v) : "l"(p));
  }
  return v;
}
template <int kBytes>
__device__ __forceinline__ uint32_t load_shared_bytes(uint32_t address) {
  uint32_t v;
  if constexpr (kBytes == 4) {
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
  } else if constexpr (kBytes == 2) {
    asm volatile("{\n.reg .b16 v;\nld.shared.b16 v, [%1];\ncvt.u32.u16 %0, v;\n}"
                 : "=r"(v)
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ld.shared.u8 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
  }
  return v;
}
__device__ __forceinline__ uint2 load_shared_8(uint32_t address) {
  uint2 v;
  asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address) : "memory");
  return v;
}

// Columns that are stored as bf16, in T.
template <typename T>
__device__ __forceinline__ uint4 from_bf16(uint4 v) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return v;
  uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    words[i] = pack<T>(__uint_as_float(words[i] << 16), __uint_as_float(words[i] & 0xffff0000));
  }
  return {words[0], words[1], words[2], words[3]};
}

// The scale of a piece, in f32: bits as they are stored, 0 where there is no row.
template <Scales kScales>
__device__ __forceinline__ float scale_value(uint32_t bits) {
  if constexpr (kScales == Scales::kNone) return 1.0f;
  if constexpr (kScales == Scales::kFloat32) return __uint_as_float(bits);
  // 2^-127, a subnormal, counts as 0; 0xff is NaN.
  if constexpr (kScales == Scales::kE8M0) {
    return __uint_as_float(bits == 0xff ? 0x7fffffff : bits << 23);
  }
  if constexpr (kScales == Scales::kE4M3) {
    return __half2float(__ushort_as_half(codes_to_f16<false>(bits) & 0xffff));
  }
}

// The factor of placed codes in bf16, twice; of f16 values in f16, twice.
template <typename T, Codes kCodes>
__device__ __forceinline__ uint32_t scale_factor(float scale) {
  if constexpr (kCodes == Codes::kE2M1) {  // values as they are, scales of up to 448
    return pack<T>(scale, scale);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return bf16_twice(clamp_scale(scale) * kPlaced);
  } else {
    return f16_twice(fminf(fmaxf(scale, -0x1p15f), 0x1p15f));
  }
}

// The factor of placed codes in bf16, twice, of an E8M0 scale: scale_factor's bits.
__device__ __forceinline__ uint32_t placed_factor(uint32_t e8m0) {
  constexpr uint32_t kOne = 0x00800080;   // in both exponents
  constexpr uint32_t kLargest = 127 + 7;  // kLargestScale; kPlaced is 2^120
  return e8m0 == 0 ? 0 : min(e8m0, kLargest) * kOne + 120 * kOne;
}

// Sixteen e4m3 codes, times scale_factor; in bf16 without what mend_codes adds.
template <typename T>
__device__ __forceinline__ void convert_codes(uint32_t (&columns)[8], uint4 codes,
                                              uint32_t factor) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    place_piece(columns, codes, factor);
  } else {
    const uint32_t v[4] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      columns[2 * i] = multiply_f16x2(codes_to_f16<false>(v[i]), factor);
      columns[2 * i + 1] = multiply_f16x2(codes_to_f16<true>(v[i]), factor);
    }
  }
}

// The bytes' upper bits say which of four codes are NaN.
__device__ __forceinline__ uint32_t find_nan(uint32_t codes) {
  return (codes & 0x7f7f7f7f) + 0x01010101;
}

// Whether any of sixteen codes, or their scale, asks for mend_codes.
__device__ __forceinline__ bool is_special(uint4 codes, float scale) {
  return (any_nan(codes) & 0x80808080) != 0 || is_large(scale);
}

// Multiplies bf16 columns with the rest of a large scale, and makes NaN of NaN codes.
__device__ __forceinline__ void mend_codes(uint32_t (&columns)[8], uint4 codes, float scale) {
  uint32_t v[4] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) asm volatile("" : "+r"(v[i]));  // find_nan anew: registers are short
  const uint32_t excess = bf16_twice(excess_of(scale));
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t nan = find_nan(v[i]);
    columns[2 * i] =
        multiply_bf16x2(columns[2 * i], excess) | (permute(nan, 0, 0x9988) & 0x7fff7fff);
    columns[2 * i + 1] =
        multiply_bf16x2(columns[2 * i + 1], excess) | (permute(nan, 0, 0xbbaa) & 0x7fff7fff);
  }
}

// Sixteen e2m1 codes, the even column in the low nibble.
template <typename T>
__device__ __forceinline__ void convert_nibbles(uint32_t (&columns)[8], uint2 codes,
                                                uint32_t factor) {
  constexpr bool kBf16 = std::is_same_v<T, __nv_bfloat16>;
  // Upper and lower bytes of 0, 0.5, 1, 1.5, 2, 3, 4, 6.
  constexpr uint32_t kUpper03 = kBf16 ? 0x3f3f3f00 : 0x3e3c3800;
  constexpr uint32_t kUpper47 = kBf16 ? 0x40404040 : 0x46444240;
  constexpr uint32_t kLower03 = kBf16 ? 0xc0800000 : 0, kLower47 = kBf16 ? 0xc0804000 : 0;
  const uint32_t v[2] = {codes.x, codes.y};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t four = v[i / 2] >> i % 2 * 16;
    const uint32_t upper = permute(kUpper03, kUpper47, four & 0x7777);
    const uint32_t lower = permute(kLower03, kLower47, four & 0x7777);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const uint32_t pair = four >> 8 * j;
      const uint32_t signs = (pair << 12 & 0x8000) | (pair << 24 & 0x80000000);
      const uint32_t values = permute(lower, upper, j == 0 ? 0x5140 : 0x7362) | signs;
      columns[2 * i + j] = multiply_pair<T>(values, factor);
    }
  }
}

}  // namespace flashmla::sm90::sparse::wide
