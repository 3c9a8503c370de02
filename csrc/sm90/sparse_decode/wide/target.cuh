// Storing converted units to a tile's buffer, here and in the cluster's other block.
#pragma once

#include "sm90/ptx/barrier.cuh"
#include "sm90/ptx/cluster.cuh"
#include "sm90/sparse_decode/wide/shared_storage.cuh"
#include "sm90/sparse_decode/wide/unit.cuh"

namespace flashmla::sm90::sparse::wide {

// The first token of a quarter whose rope columns the warp has.
__device__ __forceinline__ int rope_token(int quarter) {
  return quarter * kQuarterTokens + threadIdx.x / 32 % kWarps * kRopeRows;
}

// Where the tile's 16-bit rows go: here, and to the peer.
struct Target {
  uint32_t keys;       // the buffer's first chunk
  uint32_t full;       // its barrier
  uint32_t peer_less;  // what addresses are less in this block than in the peer

  __device__ __forceinline__ void store(uint32_t offset, uint4 v) const {
    store_shared(keys + offset, v);
  }

  // Stores to both blocks. For what is soon overwritten here, so that no copy may read it later.
  __device__ __forceinline__ void store_both(uint32_t offset, uint4 v) const {
    store(offset, v);
    store_async(keys + offset + peer_less, v, full + peer_less);
  }

  // Sends chunk `chunk` of a quarter to the peer. By one lane, when all have stored and fenced.
  __device__ __forceinline__ void send(int chunk, int quarter) const {
    constexpr int kBytes = kQuarterTokens * kChunkRowBytes;
    const uint32_t source = keys + chunk * kChunkBytes + quarter * kBytes;
    copy_to_block(source + peer_less, source, kBytes, full + peer_less);
  }
};

// Where the two halves of a lane's first piece go. Further rows and chunks are constants away.
struct PieceOffsets {
  uint32_t half[2];

  // from: where the warp's first row has its place.
  static __device__ __forceinline__ PieceOffsets of(int lane, uint32_t from) {
    const int row = lane / 4, piece = lane % 4 * 2;
    return {from + swizzled_offset(row, piece), from + swizzled_offset(row, piece + 1)};
  }
};

// Stores a unit of quarter `quarter`. offsets: in the buffer, of the warp's chunks.
template <typename Format>
__device__ __forceinline__ void store_unit(const Target& target, const PieceOffsets& offsets,
                                           const uint32_t (&columns)[kUnitPieces][8], int quarter) {
#pragma unroll
  for (int i = 0; i < kUnitPieces; ++i) {
    if (is_tail<Format>(threadIdx.x / 32 % kWarps, i % kWarpChunks)) continue;
    const auto& v = columns[i];
    const uint32_t at = quarter * (kQuarterTokens * kChunkRowBytes) +
                        i % kWarpChunks * kChunkBytes + i / kWarpChunks * (8 * kChunkRowBytes);
    target.store(offsets.half[0] + at, {v[0], v[1], v[2], v[3]});
    target.store(offsets.half[1] + at, {v[4], v[5], v[6], v[7]});
  }
}

// Stores the rope columns of a unit of quarter `quarter`.
template <typename T, typename Format>
__device__ __forceinline__ void store_rope(const Target& target, const uint4& bytes, int quarter) {
  using Rope = RopeUnit<Format>;
  const int lane = threadIdx.x % 32;
  constexpr uint32_t kAt = Rope::kChunk * kChunkBytes;
  const int token = rope_token(quarter) + Rope::row(), piece = lane % (Rope::kRowBytes / 16);
  if constexpr (Rope::kCoded) {
    if (lane * 16 >= Rope::kBytes) return;
    uint32_t v[8];
    convert_codes<T>(v, bytes, scale_factor<T, Codes::kE4M3>(1.0f));
    if (std::is_same_v<T, __nv_bfloat16> && is_special(bytes, 1.0f)) mend_codes(v, bytes, 1.0f);
    target.store_both(kAt + swizzled_offset(token, 2 * piece), {v[0], v[1], v[2], v[3]});
    target.store_both(kAt + swizzled_offset(token, 2 * piece + 1), {v[4], v[5], v[6], v[7]});
  } else {
    target.store_both(kAt + swizzled_offset(token, piece), from_bf16<T>(bytes));
  }
}

}  // namespace flashmla::sm90::sparse::wide
