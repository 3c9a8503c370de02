// Shared-memory matrix descriptors for wgmma, for 16-bit elements in the 128-byte swizzle.
//
// The unit is a chunk: 64 columns (128 bytes) of some rows, each row 128 bytes after the last, its
// eight 16-byte pieces permuted by piece ^= row % 8. A chunk starts on a 1024-byte boundary. TMA
// writes this layout when the tensor map says SWIZZLE_128B.
#pragma once

#include <cstdint>

namespace flashmla::sm90 {

constexpr int kChunkColumns = 64;         // 16-bit elements in a 128-byte row
constexpr int kSwizzleGroupBytes = 1024;  // 8 rows

__device__ __forceinline__ uint32_t smem_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Byte offset of 16-byte piece `piece` of `row` within a chunk.
__device__ __forceinline__ uint32_t swizzled_offset(int row, int piece) {
  return row * 128 + ((piece ^ (row & 7)) << 4);
}

// Rows are M or N, the 64 columns are K. Step k16 by adding 2 to the descriptor (32 bytes).
__device__ __forceinline__ uint64_t k_major_desc(uint32_t address) {
  constexpr uint64_t kFixed = (uint64_t{1} << 62) |                        // 128-byte swizzle
                              (uint64_t{kSwizzleGroupBytes >> 4} << 32) |  // 8 rows to the next 8
                              (uint64_t{1} << 16);                         // unused here
  return kFixed | ((address & 0x3FFFF) >> 4);
}

// Rows are M or N, 16 columns are K, not swizzled: eight rows' 16-byte pieces one after the other,
// `piece_bytes` from the first eight columns to the other eight, `group_bytes` from 8 rows to the
// next.
__device__ __forceinline__ uint64_t unswizzled_desc(uint32_t address, uint32_t piece_bytes,
                                                    uint32_t group_bytes) {
  return (uint64_t{group_bytes >> 4} << 32) | (uint64_t{piece_bytes >> 4} << 16) |
         ((address & 0x3FFFF) >> 4);
}

// Rows are K, columns are N; chunk_bytes leads from 64 columns of N to the next 64. Step k16 by
// adding 128 to the descriptor (16 rows).
__device__ __forceinline__ uint64_t mn_major_desc(uint32_t address, uint32_t chunk_bytes) {
  constexpr uint64_t kFixed = (uint64_t{1} << 62) | (uint64_t{kSwizzleGroupBytes >> 4} << 32);
  return kFixed | (uint64_t{chunk_bytes >> 4} << 16) | ((address & 0x3FFFF) >> 4);
}

}  // namespace flashmla::sm90
