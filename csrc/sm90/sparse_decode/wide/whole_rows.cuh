// Sixteen whole rows, which one warp brings and converts: on their way to its slot in shared
// memory, and from there unit by unit to registers.
#pragma once

#include "sm90/ptx/copy_async.cuh"
#include "sm90/sparse_decode/wide/plan.cuh"
#include "sm90/sparse_decode/wide/target.cuh"
#include "sm90/sparse_decode/wide/unit.cuh"

namespace flashmla::sm90::sparse::wide {

// Row `row` of the sixteen, whose places lanes 0 to 15 have.
__device__ __forceinline__ const uint8_t* row_of(const RowPlace& place, int row) {
  return reinterpret_cast<const uint8_t*>(
      __shfl_sync(~0u, reinterpret_cast<uint64_t>(place.row), row));
}

// Where of sixteen rows, eight pieces each, the lanes of a unit read them: eight rows by four.
__device__ __forceinline__ constexpr int unit_piece(int row, int piece) {
  return (row / 8 * 2 + piece / 4) * 32 + row % 8 * 4 + piece % 4;
}

// The codes of rows 4 kFirst to 4 kLast. Eight lanes have a row's 128 bytes, as few lines as there
// are: each takes the caches' time, which all loads and stores wait for.
template <typename Format, int kFirst, int kLast>
__device__ __forceinline__ void copy_codes(uint32_t slot, const RowPlace& place) {
  constexpr int kPiece = UnitBytes<Format>::kPiece;
  const int lane = threadIdx.x % 32, piece = lane % 8;
  const uint32_t target = slot + unit_piece(lane / 8, piece) * kPiece;
#pragma unroll
  for (int i = kFirst; i < kLast; ++i) {
    const uint8_t* row = row_of(place, 4 * i + lane / 8) + piece * kPiece;
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      if (is_tail<Format>(group, piece / 4)) continue;
      const uint32_t at = group * RowsBytes<Format>::kUnit + unit_piece(4 * i, 0) * kPiece;
      if constexpr (kPiece == 16)
        copy_16(target + at, row + group * 8 * kPiece);
      else
        copy_8(target + at, row + group * 8 * kPiece);
    }
  }
}

// The rows' scales, and the columns that are not among the groups' codes: v4's to the slot, others
// to their chunk, swizzled if they are no codes. rope: the chunk's first row of the sixteen.
template <typename Format>
__device__ __forceinline__ void copy_rest(uint32_t slot, uint32_t rope, const RowPlace& place) {
  using Bytes = RowsBytes<Format>;
  using Rope = RopeUnit<Format>;
  const int lane = threadIdx.x % 32, piece = lane % 8;
  if constexpr (!Rope::kNone) {
#pragma unroll
    for (int i = 0; i < kQuarterTokens / 4; ++i) {
      const int row = 4 * i + lane / 8;
      const uint8_t* source = row_of(place, row) + Rope::kOffset + piece * 16;
      if constexpr (Bytes::kTail)
        copy_16(slot + Bytes::kTailAt + unit_piece(row, piece) * 16, source);
      else if constexpr (!Rope::kCoded)
        copy_16(rope + swizzled_offset(row, piece), source);
      else if (piece * 16 < Rope::kRowBytes)
        copy_16(rope + row * kChunkRowBytes + piece * 16, source);
    }
  }
  if constexpr (!UnitScales<Format>::kNone) {
    constexpr int kRow = Bytes::kRowScales, kScales = kRow < 16 ? kRow : 16;
    static_assert(kScales >= 8 && kRow / kScales <= 2);
    const int of_row = lane / kQuarterTokens * kScales;  // the lane's bytes
    if (of_row >= kRow) return;
    const uint32_t target = slot + Bytes::kScalesAt + lane % kQuarterTokens * kRow + of_row;
    if constexpr (Format::kTwoPlanes)
      copy_8(target, place.row + int64_t{place.scales} * 8);
    else
      copy_16(target, place.row + Format::kScaleOffset + of_row);
  }
}

// Makes what lies in the rope's chunk what scores are computed from.
template <typename T, typename Format>
__device__ __forceinline__ void finish_rope(uint32_t rope) {
  using Rope = RopeUnit<Format>;
  if constexpr (Rope::kCoded) {
    uint4 codes[kLaneRows];
#pragma unroll
    for (int r = 0; r < kLaneRows; ++r) {
      codes[r] = load_shared(rope + lane_row(r) * kChunkRowBytes + lane_piece() * 16);
    }
    __syncwarp();
#pragma unroll
    for (int r = 0; r < kLaneRows; ++r) {
      uint32_t v[8];
      convert_codes<T>(v, codes[r], scale_factor<T, Codes::kE4M3>(1.0f));
      if (std::is_same_v<T, __nv_bfloat16> && is_special(codes[r], 1.0f)) {
        mend_codes(v, codes[r], 1.0f);
      }
      store_shared(rope + swizzled_offset(lane_row(r), 2 * lane_piece()), {v[0], v[1], v[2], v[3]});
      store_shared(rope + swizzled_offset(lane_row(r), 2 * lane_piece() + 1),
                   {v[4], v[5], v[6], v[7]});
    }
  } else if constexpr (!Rope::kNone && !RowsBytes<Format>::kTail &&
                       !std::is_same_v<T, __nv_bfloat16>) {
#pragma unroll
    for (int i = 0; i < kUnitPieces; ++i) {
      const uint32_t at = rope + swizzled_offset(lane_row(i / 2), lane_piece() + i % 2 * 4);
      store_shared(at, from_bf16<T>(load_shared(at)));
    }
  }
}

// A unit from its rows.
template <typename Format>
__device__ __forceinline__ void read_group(RawUnit& raw, uint32_t slot, int group) {
  using Bytes = RowsBytes<Format>;
  using Unit = UnitBytes<Format>;
  using Lane = UnitScales<Format>;
  const uint32_t codes = slot + group * Bytes::kUnit + threadIdx.x % 32 * Unit::kPiece;
#pragma unroll
  for (int i = 0; i < kUnitPieces; ++i) {
    raw.codes[i] = {};
    if constexpr (Unit::kPiece == 16) {
      if (!is_tail<Format>(group, i % kWarpChunks)) {
        raw.codes[i] = load_shared(codes + i * 32 * Unit::kPiece);
      }
    } else {
      const uint2 half = load_shared_8(codes + i * 32 * Unit::kPiece);
      raw.codes[i] = {half.x, half.y, 0, 0};
    }
  }
  if constexpr (!Lane::kNone) {
#pragma unroll
    for (int j = 0; j < Lane::kLoads; ++j) {
      raw.scales[j] = load_shared_bytes<Lane::kBytes>(
          slot + Bytes::kScalesAt + lane_row(Lane::row_of(j)) * Bytes::kRowScales +
          group * Lane::kWarpBytes + Lane::byte_of(j));
    }
  }
}

// Stores a unit. offsets: of the warp's rows in the buffer.
template <typename Format>
__device__ __forceinline__ void store_group(const PieceOffsets& offsets,
                                            const uint32_t (&columns)[kUnitPieces][8], int group) {
#pragma unroll
  for (int i = 0; i < kUnitPieces; ++i) {
    if (is_tail<Format>(group, i % kWarpChunks)) continue;
    const auto& v = columns[i];
    const uint32_t at = (group * kWarpChunks + i % kWarpChunks) * kChunkBytes +
                        i / kWarpChunks * (8 * kChunkRowBytes);
    store_shared(at + offsets.half[0], {v[0], v[1], v[2], v[3]});
    store_shared(at + offsets.half[1], {v[4], v[5], v[6], v[7]});
  }
}

// v4's columns that are no codes, as a unit's lanes have pieces.
template <typename Format>
__device__ __forceinline__ void read_tail(uint4 (&pieces)[kUnitPieces], uint32_t slot) {
  const uint32_t source = slot + RowsBytes<Format>::kTailAt + threadIdx.x % 32 * 16;
#pragma unroll
  for (int i = 0; i < kUnitPieces; ++i) pieces[i] = load_shared(source + i * 32 * 16);
}

// rows: where the warp's first row has its place in the buffer.
template <typename T>
__device__ __forceinline__ void store_tail(uint32_t rows, const uint4 (&pieces)[kUnitPieces]) {
  const uint32_t target = rows + (kLatentChunks - 1) * kChunkBytes;
#pragma unroll
  for (int i = 0; i < kUnitPieces; ++i) {
    store_shared(target + swizzled_offset(lane_row(i / 2), lane_piece() + i % 2 * 4),
                 from_bf16<T>(pieces[i]));
  }
}

}  // namespace flashmla::sm90::sparse::wide
