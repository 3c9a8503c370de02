// Sixteen rows of a tile, by 128 of their latent columns, which one warp converts: as they lie, in
// registers, and as 16-bit columns.
//
// A lane has four pieces of sixteen columns. The eight lanes that store at once have two rows, so
// that they reach all banks.
#pragma once

#include "sm90/ptx/cluster.cuh"
#include "sm90/ptx/smem_desc.cuh"
#include "sm90/sparse_decode/wide/config.h"
#include "sm90/sparse_decode/wide/piece.cuh"

namespace flashmla::sm90::sparse::wide {

constexpr int kWarpChunks = kLatentChunks / kWarps;  // of 64 columns
constexpr int kUnitPieces = kQuarterTokens * kWarpChunks * 64 / kPieceColumns / 32;  // of a lane
constexpr int kLaneRows = kUnitPieces / kWarpChunks;

// A warp among a warpgroup's four; the compiler is told that all lanes have the same.
__device__ __forceinline__ int warp_of_four() {
  return __shfl_sync(~0u, threadIdx.x / 32 % kWarps, 0);
}

// Of a unit's pieces a lane has number `i` in row i / 2 of its rows, chunk i % 2 of its warp's.
__device__ __forceinline__ int lane_row(int r) { return threadIdx.x / 4 % 8 + 8 * r; }
__device__ __forceinline__ int lane_piece() { return threadIdx.x % 4; }

// Whether chunk `c` of a group holds no codes: v4's last one is rope.
template <typename Format>
__device__ __forceinline__ bool is_tail(int group, int c) {
  return Format::kCodeColumns < kValueDim && c == 1 && group == kGroups - 1;
}

// What a lane must know of a unit's scales: how they are loaded, a row's by one load or a piece's.
template <typename Format>
struct UnitScales {
  static constexpr bool kNone = Format::kScales == Scales::kNone;
  static constexpr bool kOfPiece = Format::kGroup < 32;
  static constexpr int kLoads = kOfPiece ? kUnitPieces : kLaneRows;
  static constexpr int kValueBytes = Format::kScales == Scales::kFloat32 ? 4 : 1;
  // Of the warp's columns, in a row; of them a load's.
  static constexpr int kWarpBytes = kWarpChunks * 64 / Format::kGroup * kValueBytes;
  static constexpr int kBytes = kOfPiece ? 1 : kWarpBytes;

  // Row of the lane's, and byte of the warp's scales in it, of load `j`.
  static __device__ __forceinline__ int row_of(int j) { return kOfPiece ? j / kWarpChunks : j; }
  static __device__ __forceinline__ int byte_of(int j) {
    return kOfPiece ? j % kWarpChunks * 4 + lane_piece() : 0;
  }
  // The bits of piece `i`'s.
  static __device__ __forceinline__ uint32_t bits(const uint32_t (&scales)[kUnitPieces], int group,
                                                  int i) {
    if constexpr (kOfPiece) return scales[i];
    const uint32_t row = scales[i / kWarpChunks];
    if constexpr (kValueBytes == 4) return row;
    const int c = i % kWarpChunks;
    if (is_tail<Format>(group, c)) return 0;
    if constexpr (Format::kGroup == 64) return row >> 8 * c & 0xff;
    return row >> (lane_piece() / 2 * 8 + 16 * c) & 0xff;
  }
};

struct RawUnit {
  uint4 codes[kUnitPieces];
  uint32_t scales[kUnitPieces];  // as UnitScales says
};

// The factors of the lane's pieces.
template <typename T, typename Format>
__device__ __forceinline__ uint32_t piece_factor(const RawUnit& raw, int group, int i) {
  using Lane = UnitScales<Format>;
  if constexpr (Lane::kNone) {
    return scale_factor<T, Format::kCodes>(1.0f);
  } else if constexpr (Format::kScales == Scales::kE8M0 && std::is_same_v<T, __nv_bfloat16>) {
    return placed_factor(Lane::bits(raw.scales, group, i));
  } else {
    return scale_factor<T, Format::kCodes>(
        scale_value<Format::kScales>(Lane::bits(raw.scales, group, i)));
  }
}

// The lane's pieces to 16 bit. group: of columns, the unit's.
template <typename T, typename Format>
__device__ __forceinline__ void convert_unit(uint32_t (&columns)[kUnitPieces][8],
                                             const RawUnit& raw, int group) {
  constexpr bool kMends = Format::kCodes == Codes::kE4M3 && std::is_same_v<T, __nv_bfloat16>;
  const auto scale_of = [&](int i) {
    if constexpr (UnitScales<Format>::kNone) return 1.0f;
    return scale_value<Format::kScales>(UnitScales<Format>::bits(raw.scales, group, i));
  };
  bool special = false;
  if constexpr (kMends) {
    uint32_t nan = 0;
#pragma unroll
    for (int i = 0; i < kUnitPieces; ++i) nan |= any_nan(raw.codes[i]);
    special = (nan & 0x80808080) != 0;
#pragma unroll
    for (int i = 0; i < kUnitPieces; ++i) special = is_large(scale_of(i)) | special;
  }
#pragma unroll
  for (int i = 0; i < kUnitPieces; ++i) {
    const uint32_t factor = piece_factor<T, Format>(raw, group, i);
    if constexpr (Format::kCodes == Codes::kE2M1)
      convert_nibbles<T>(columns[i], {raw.codes[i].x, raw.codes[i].y}, factor);
    else
      convert_codes<T>(columns[i], raw.codes[i], factor);
  }
  if constexpr (kMends) {
    if (special) [[unlikely]] {
#pragma unroll
      for (int i = 0; i < kUnitPieces; ++i) mend_codes(columns[i], raw.codes[i], scale_of(i));
    }
  }
  // Here: before a wait that follows, and before what they were is loaded anew.
#pragma unroll
  for (int i = 0; i < kUnitPieces * 8; ++i) asm volatile("" : "+r"(columns[i / 8][i % 8]));
}

// A unit's last 64 columns where they are not among the latent codes, of four rows. A lane has
// eight 16-bit columns, or with codes half of the lanes sixteen.
template <typename Format>
struct RopeUnit {
  static constexpr bool kCoded = Format::kCodeColumns > kValueDim;
  static constexpr bool kNone =
      Format::kCodes == Codes::kNone ||
      (Format::kCodeColumns == kValueDim && Format::kHeadDim == kValueDim);
  static constexpr int kChunk = kCoded ? kLatentChunks : Format::kCodeColumns / 64;
  static constexpr int kRowBytes = kCoded ? 64 : 128;
  static constexpr int kBytes = kNone ? 0 : kRopeRows * kRowBytes;
  static constexpr int kOffset = kCoded ? kValueDim : Format::kTailOffset;  // in a row

  // The lane's row of the four, and byte of its columns.
  static __device__ __forceinline__ int row() {
    return threadIdx.x % 32 / (kRowBytes / 16) % kRopeRows;
  }
  static __device__ __forceinline__ int byte() { return threadIdx.x % (kRowBytes / 16) * 16; }
};

}  // namespace flashmla::sm90::sparse::wide
