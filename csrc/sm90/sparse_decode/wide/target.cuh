// Storing converted units to a tile's buffer, in a cluster to the peer's too.
#pragma once

#include "sm90/ptx/barrier.cuh"
#include "sm90/ptx/cluster.cuh"
#include "sm90/sparse_decode/wide/shared_storage.cuh"
#include "sm90/sparse_decode/wide/unit.cuh"

namespace flashmla::sm90::sparse::wide {

// The warp's first token of a quarter.
__device__ __forceinline__ int first_token(int quarter) {
  return quarter * kQuarterTokens + threadIdx.x / 32 % kWarps * kUnitRows;
}

// Where the tile's 16-bit rows go: here, and in a cluster to the peer.
template <int kBlocks>
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
    if constexpr (kBlocks == 2) store_async(keys + offset + peer_less, v, full + peer_less);
  }

  // Sends the warp's rows from `first` on of chunk `chunk` to the peer. By one lane, when all have
  // stored and fenced.
  __device__ __forceinline__ void send(int chunk, int first) const {
    if constexpr (kBlocks == 2) {
      const uint32_t source = keys + chunk * kChunkBytes + first * kChunkRowBytes;
      copy_to_block(source + peer_less, source, kUnitRows * kChunkRowBytes, full + peer_less);
    }
  }
};

// Where in a buffer a lane's pieces go, less the quarter's place.
template <int kShift>
struct PieceOffsets {
  uint32_t at[2][2];  // by pair of rows, half of the piece

  __device__ __forceinline__ void find() {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int piece = unit_piece<kShift>(0), row = first_token(0) + unit_row(i / 2 * 2);
      at[i / 2][i % 2] = piece / 4 * kChunkBytes + swizzled_offset(row, piece % 4 * 2 + i % 2);
    }
  }

  // Of half `half` of piece `i`: the other pieces are four chunks away.
  __device__ __forceinline__ uint32_t of(int i, int half) const {
    constexpr uint32_t kFurther = 4 * kChunkBytes;
    const uint32_t first = i / 2 == 0 ? at[0][half] : at[1][half];
    return kShift == 0 ? first + i % 2 * kFurther : first ^ i % 2 * kFurther;
  }
};

// Multiplies columns that were stored with the rest of large scales, and makes NaN of pieces with
// NaN codes: a row with one has only NaN results.
template <typename Format, int kShift>
__device__ __forceinline__ void mend_unit(uint32_t keys, const PieceOffsets<kShift>& offsets,
                                          const Mend& mend) {
#pragma unroll 1
  for (int i = 0; i < kUnitPieces; ++i) {
    float scale = 1.0f;
    if constexpr (Format::kScales != Scales::kNone) {
      using Lanes = UnitScales<Format, kShift>;
      uint32_t bits = __shfl_sync(~0u, mend.scales, Lanes::lane_of(i));
      if constexpr (Format::kScales != Scales::kFloat32) {
        bits = bits >> 8 * Lanes::place_of(i) & 0xff;
      }
      scale = scale_value<Format::kScales>(bits);
    }
    if (is_tail<Format>(i)) continue;
    const uint32_t excess = bf16_twice(excess_of(scale));
    const uint32_t nan = mend.nan >> i & 1 ? 0x7fff7fff : 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t at = keys + offsets.of(i, half);
      uint4 v = load_shared(at);
      v.x = multiply_bf16x2(v.x, excess) | nan, v.y = multiply_bf16x2(v.y, excess) | nan;
      v.z = multiply_bf16x2(v.z, excess) | nan, v.w = multiply_bf16x2(v.w, excess) | nan;
      store_shared(at, v);
    }
  }
}

template <typename Format, int kBlocks, int kShift>
__device__ __forceinline__ void store_unit(const Target<kBlocks>& target,
                                           const PieceOffsets<kShift>& offsets,
                                           const uint32_t (&columns)[kUnitPieces][8],
                                           const Mend& mend, int quarter) {
  const uint32_t unit = quarter * (kQuarterTokens * kChunkRowBytes);
#pragma unroll
  for (int i = 0; i < kUnitPieces; ++i) {
    if (is_tail<Format>(i)) continue;
    const auto& v = columns[i];
    target.store(offsets.of(i, 0) + unit, {v[0], v[1], v[2], v[3]});
    target.store(offsets.of(i, 1) + unit, {v[4], v[5], v[6], v[7]});
  }
  if (mend.needed) [[unlikely]]
    mend_unit<Format>(target.keys + unit, offsets, mend);
}

// A unit's last 64 columns where they are not among the latent codes. A lane has eight 16-bit
// columns, or with codes half of the lanes sixteen.
template <typename Format>
struct RopeUnit {
  static constexpr bool kCoded = Format::kCodeColumns > kValueDim;
  static constexpr bool kNone = Format::kCodeColumns == kValueDim && Format::kHeadDim == kValueDim;
  static constexpr int kChunk = kCoded ? kLatentChunks : Format::kCodeColumns / 64;

  template <typename Rows>
  static __device__ __forceinline__ void load(uint4& bytes, const Rows& rows) {
    const int lane = threadIdx.x % 32;
    if constexpr (kCoded)
      bytes = rows.load_16(lane / 4 % kUnitRows, kValueDim + lane % 4 * 16);
    else
      bytes = rows.load_16(lane / 8, Format::kTailOffset + lane % 8 * 16);
  }

  template <typename T, int kBlocks>
  static __device__ __forceinline__ void store(const Target<kBlocks>& target, const uint4& bytes,
                                               int first) {
    const int lane = threadIdx.x % 32;
    constexpr uint32_t kAt = kChunk * kChunkBytes;
    if constexpr (kCoded) {
      if (lane / 4 >= kUnitRows) return;
      uint32_t v[8];
      convert_codes<T>(v, bytes, scale_factor<T, Codes::kE4M3>(1.0f));
      if (std::is_same_v<T, __nv_bfloat16> && is_special(bytes, 1.0f)) mend_codes(v, bytes, 1.0f);
      const int token = first + lane / 4, unit = lane % 4 * 2;
      target.store_both(kAt + swizzled_offset(token, unit), {v[0], v[1], v[2], v[3]});
      target.store_both(kAt + swizzled_offset(token, unit + 1), {v[4], v[5], v[6], v[7]});
    } else {
      target.store_both(kAt + swizzled_offset(first + lane / 8, lane % 8), from_bf16<T>(bytes));
    }
  }
};

}  // namespace flashmla::sm90::sparse::wide
