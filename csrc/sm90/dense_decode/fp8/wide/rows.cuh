// Eight rows of a tile, which one warp brings and converts in the very slot in which they will be
// 16-bit rows.
//
// They have eight chunks of 64 columns, 1 KB each: four in the slot's left half, four in its right
// half. Their codes come to the right half, two chunks a KB, and are converted chunk by chunk: what
// a chunk's columns overwrite has been read. What follows the codes in a row comes to the left
// half.
#pragma once

#include "sm90/dense_decode/fp8/wide/shared_storage.cuh"
#include "sm90/formats/codes.cuh"
#include "sm90/ptx/matrix.cuh"

namespace flashmla::sm90::dense_decode::fp8::wide {

// Where a warp's eight rows of a slot are.
struct GroupRows {
  uint32_t left, rope;

  static __device__ __forceinline__ GroupRows of(const WideStorage& smem, int slot, int group) {
    return {smem_address(smem.latent[0][0]) + slot * (2 * kHalfBytes) + group * kTokenGroupBytes,
            smem_address(smem.rope[0]) + slot * kChunkBytes + group * kGroupBytes};
  }
  __device__ __forceinline__ uint32_t right() const { return left + kHalfBytes; }
  __device__ __forceinline__ uint32_t chunk(int c) const {
    return c < kHalfChunks ? left + c * kGroupBytes : right() + (c - kHalfChunks) * kGroupBytes;
  }
};

// A lane has sixteen columns of each chunk, lane % 4, of this row. Of two rows that are read or
// written together the numbers differ in bits 0 and 2: so there are no bank conflicts.
__device__ __forceinline__ int row_of_lane(int lane) { return lane / 8 ^ lane / 4 % 2 * 5; }

constexpr int kScaleBytes = V32::kRopeOffset - V32::kScaleOffset;
constexpr int kRestBytes = V32::kRowBytes - kValueDim;  // scales, then the rope

// Zeros instead of raw rows from `count` on.
__device__ __forceinline__ void zero_rows(const GroupRows& rows, int count, int lane) {
#pragma unroll 1
  for (int row = count; row < kGroupTokens; ++row) {
    store_shared(rows.right() + lane / 8 * kGroupBytes + row * kChunkRowBytes + lane % 8 * 16,
                 uint4{});
    if (lane * 16 < kRestBytes) {
      store_shared(rows.left + row * kRestBytes + lane * 16, uint4{});
    }
  }
  __syncwarp();
}

// bf16 factors of a row's four groups of columns, two in a register: scales times kPlaced, or
// scales.
using Factors = uint32_t[2];

__device__ __forceinline__ uint32_t factor_of(const Factors& factors, int group) {
  return __byte_perm(factors[group / 2], 0, group % 2 ? 0x3232 : 0x1010);
}

// Makes 16-bit rows of codes. kLarge: scales of any size, in two multiplications.
template <bool kLarge>
__device__ __forceinline__ void convert_codes(const GroupRows& rows, int lane,
                                              const Factors& factors) {
  const int row = row_of_lane(lane);
  const uint32_t codes_at = rows.right() + swizzled_offset(row, lane % 4);
  const uint32_t swizzled = swizzled_offset(row, lane % 4 * 2);
  const auto read = [&](int c) {
    return load_shared((c % 2 ? codes_at ^ 64 : codes_at) + c / 2 * kGroupBytes);
  };
  uint32_t noted = 0;
  uint4 next{};
  if constexpr (!kLarge) next = read(0);
#pragma unroll
  for (int c = 0; c < kLatentChunks; ++c) {
    // A chunk ahead, if registers are not too few.
    const uint4 codes = kLarge ? read(c) : next;
    if (!kLarge && c + 1 < kLatentChunks) next = read(c + 1);
    __syncwarp();  // all have read what is overwritten
    const uint32_t factor = factor_of(factors, c / 2);
    uint32_t v[8];
    place_piece(v, codes, kLarge ? bf16_twice(kPlaced) : factor);
    if constexpr (kLarge) {
#pragma unroll
      for (uint32_t& x : v) x = multiply_bf16x2(x, factor);
    }
    noted |= any_nan(codes);
    const uint32_t at = rows.chunk(c) + swizzled;
    store_shared(at, {v[0], v[1], v[2], v[3]});
    store_shared(at ^ 16, {v[4], v[5], v[6], v[7]});
  }
  // A token whose key is NaN is NaN to all that attend it: here of its rope, which is no value.
  if (noted & 0x80808080) {
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(rows.rope + row * kChunkRowBytes + lane % 4 * 4),
                 "r"(0x7fff7fff)
                 : "memory");
  }
}

// Makes 16-bit rows of what has come.
__device__ __forceinline__ void convert_rows(const GroupRows& rows, int lane) {
  const uint4 v = load_shared(rows.left + row_of_lane(lane) * kRestBytes);
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const int row = lane / 8 + 4 * j, piece = lane % 8;
    store_shared(rows.rope + swizzled_offset(row, piece),
                 load_shared(rows.left + row * kRestBytes + kScaleBytes + piece * 16));
  }
  __syncwarp();  // before NaN are stored there
  const float scale[4] = {__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z),
                          __uint_as_float(v.w)};
  bool large = false;
#pragma unroll
  for (int i = 0; i < 4; ++i) large = large || is_large(scale[i]);
  large = __any_sync(~0u, large);
  const float unit = large ? 1.0f : kPlaced;
  const Factors factors = {pack<__nv_bfloat16>(scale[0] * unit, scale[1] * unit),
                           pack<__nv_bfloat16>(scale[2] * unit, scale[3] * unit)};
  if (large) [[unlikely]]
    convert_codes<true>(rows, lane, factors);
  else
    convert_codes<false>(rows, lane, factors);
}

}  // namespace flashmla::sm90::dense_decode::fp8::wide
