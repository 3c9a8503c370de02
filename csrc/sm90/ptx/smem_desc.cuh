// Shared-memory matrix descriptors for wgmma, for 16-bit elements in the 128-byte swizzle.
//
// The unit is a group: 64 columns (128 bytes) of eight rows, each row 128 bytes after the last, its
// eight 16-byte pieces permuted by piece ^= row % 8. A group starts on a 1024-byte boundary. TMA
// writes this layout when the tensor map says SWIZZLE_128B. A chunk is the groups of some rows'
// same 64 columns, one after the other or further apart.
#pragma once

#include <cstdint>

namespace flashmla::sm90 {

constexpr int kChunkColumns = 64;  // 16-bit elements in a 128-byte row
constexpr int kGroupBytes = 1024;

__device__ __forceinline__ uint32_t smem_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Byte offset of 16-byte piece `piece` of `row` within a chunk without gaps.
__device__ __forceinline__ uint32_t swizzled_offset(int row, int piece) {
  return row * 128 + ((piece ^ (row & 7)) << 4);
}

// Rows are M or N, the 64 columns are K; row_stride leads from 8 rows to the next 8. Step k16 by
// adding 2 to the descriptor (32 bytes).
__device__ __forceinline__ uint64_t k_major_desc(uint32_t address,
                                                 uint32_t row_stride = kGroupBytes) {
  const uint64_t fixed = (uint64_t{1} << 62) |  // 128-byte swizzle
                         (uint64_t{row_stride >> 4} << 32) | (uint64_t{1} << 16);  // unused here
  return fixed | ((address & 0x3FFFF) >> 4);
}

// Rows are M or N, 16 columns are K, not swizzled: eight rows' 16-byte pieces one after the other,
// `piece_bytes` from the first eight columns to the other eight, `group_bytes` from 8 rows to the
// next.
__device__ __forceinline__ uint64_t unswizzled_desc(uint32_t address, uint32_t piece_bytes,
                                                    uint32_t group_bytes) {
  return (uint64_t{group_bytes >> 4} << 32) | (uint64_t{piece_bytes >> 4} << 16) |
         ((address & 0x3FFFF) >> 4);
}

// Rows are K, columns are N; column_stride leads from 64 columns of N to the next 64, row_stride
// from 8 rows to the next 8. Step k16 by adding row_stride / 8 to the descriptor (16 rows).
__device__ __forceinline__ uint64_t mn_major_desc(uint32_t address, uint32_t column_stride,
                                                  uint32_t row_stride) {
  const uint64_t fixed = (uint64_t{1} << 62) | (uint64_t{row_stride >> 4} << 32);
  return fixed | (uint64_t{column_stride >> 4} << 16) | ((address & 0x3FFFF) >> 4);
}

// The lower half of k_major_desc's descriptor, which steps as that does; the upper half is
// constant.
__device__ __forceinline__ uint32_t operand_at(const void* chunk) {
  return static_cast<uint32_t>(k_major_desc(smem_address(chunk)));
}
__device__ __forceinline__ uint64_t descriptor(uint32_t operand) {
  return (k_major_desc(0) & ~uint64_t{0xffffffff}) | operand;
}

}  // namespace flashmla::sm90
