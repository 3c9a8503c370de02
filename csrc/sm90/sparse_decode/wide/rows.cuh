// A unit's rows: where they are, and on their way to registers or to a ring.
#pragma once

#include "sm90/ptx/copy_async.cuh"
#include "sm90/sparse_decode/wide/plan.cuh"
#include "sm90/sparse_decode/wide/unit.cuh"

namespace flashmla::sm90::sparse::wide {

// Where a lane's rows of a unit are in global memory, and its row of the rope columns.
template <typename Format>
struct UnitPlaces {
  using Lane = UnitScales<Format>;
  using Rope = RopeUnit<Format>;
  const uint8_t* codes[kLaneRows];   // the lane's first piece of the row
  const uint8_t* scales[kLaneRows];  // the warp's first one
  const uint8_t* rope;

  // first: the lane whose token is the unit's first one.
  __device__ __forceinline__ UnitPlaces(const RowPlace& place, int first, int warp) {
    const auto from = [](const uint8_t* p, int lane) {
      return reinterpret_cast<const uint8_t*>(
          __shfl_sync(~0u, reinterpret_cast<uint64_t>(p), lane));
    };
    constexpr int kPieceBytes = UnitBytes<Format>::kPiece;
#pragma unroll
    for (int r = 0; r < kLaneRows; ++r) {
      const uint8_t* row = from(place.row, first + lane_row(r));
      codes[r] = row + (warp * kWarpChunks * 4 + lane_piece()) * kPieceBytes;
      if constexpr (Format::kTwoPlanes)
        scales[r] = row + int64_t{__shfl_sync(~0u, place.scales, first + lane_row(r))} * 8;
      else
        scales[r] = row + Format::kScaleOffset;
      scales[r] += warp * Lane::kWarpBytes;
    }
    if constexpr (!Rope::kNone) {
      rope = from(place.row, first + warp * kRopeRows + Rope::row()) + Rope::kOffset + Rope::byte();
    }
  }
};

// A unit but for its rope columns to registers.
template <typename Format>
__device__ __forceinline__ void load_unit(RawUnit& raw, const UnitPlaces<Format>& places) {
  using Lane = UnitScales<Format>;
#pragma unroll
  for (int i = 0; i < kUnitPieces; ++i) {
    const int c = i % kWarpChunks;
    const uint8_t* codes = places.codes[i / kWarpChunks] + c * 4 * UnitBytes<Format>::kPiece;
    raw.codes[i] = {};
    if constexpr (Format::kCodes == Codes::kE2M1) {
      const uint2 half = load_8(codes);
      raw.codes[i] = {half.x, half.y, 0, 0};
    } else if (!is_tail<Format>(threadIdx.x / 32 % kWarps, c)) {
      raw.codes[i] = load_16(codes);
    }
  }
  if constexpr (!Lane::kNone) {
#pragma unroll
    for (int j = 0; j < Lane::kLoads; ++j) {
      raw.scales[j] = load_bytes<Lane::kBytes>(places.scales[Lane::row_of(j)] + Lane::byte_of(j));
    }
  }
}

// A unit but for its rope columns to its slot.
template <typename Format>
__device__ __forceinline__ void copy_unit(uint32_t slot, const UnitPlaces<Format>& places) {
  using Bytes = UnitBytes<Format>;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < kUnitPieces; ++i) {
    const int c = i % kWarpChunks;
    const uint8_t* codes = places.codes[i / kWarpChunks] + c * 4 * Bytes::kPiece;
    const uint32_t target = slot + (i * 32 + lane) * Bytes::kPiece;
    if (is_tail<Format>(threadIdx.x / 32 % kWarps, c)) continue;
    if constexpr (Bytes::kPiece == 16)
      copy_16(target, codes);
    else
      copy_8(target, codes);
  }
  using Lane = UnitScales<Format>;
  if constexpr (!Lane::kNone) {
    const int r = lane_piece();
    const uint8_t* scales = r == 0 ? places.scales[0] : places.scales[1];
    if (Format::kTwoPlanes) scales -= warp_of_four() * Lane::kWarpBytes;  // all warps'
    const uint32_t target = slot + Bytes::kCodes + lane_row(r) * Bytes::kRowScales;
    if (r < kLaneRows) {
      if constexpr (Bytes::kRowScales == 8)
        copy_8(target, scales);
      else
        copy_4(target, scales);
    }
  }
}

// The unit's rope columns, behind it.
template <typename Format>
__device__ __forceinline__ void copy_rope(uint32_t slot, const UnitPlaces<Format>& places) {
  using Bytes = UnitBytes<Format>;
  const int lane = threadIdx.x % 32;
  if constexpr (!RopeUnit<Format>::kNone) {
    if (lane * 16 < RopeUnit<Format>::kBytes) {
      copy_16(slot + Bytes::kCodes + Bytes::kScales + lane * 16, places.rope);
    }
  }
}

// A unit but for its rope columns from its slot.
template <typename Format>
__device__ __forceinline__ void read_unit(RawUnit& raw, uint32_t slot) {
  using Bytes = UnitBytes<Format>;
  using Lane = UnitScales<Format>;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < kUnitPieces; ++i) {
    const uint32_t at = slot + (i * 32 + lane) * Bytes::kPiece;
    if constexpr (Bytes::kPiece == 16) {
      raw.codes[i] = load_shared(at);
    } else {
      const uint2 half = load_shared_8(at);
      raw.codes[i] = {half.x, half.y, 0, 0};
    }
  }
  if constexpr (!Lane::kNone) {
#pragma unroll
    for (int j = 0; j < Lane::kLoads; ++j) {
      const uint32_t row = slot + Bytes::kCodes + lane_row(Lane::row_of(j)) * Bytes::kRowScales;
      const uint32_t first = Format::kTwoPlanes ? threadIdx.x / 32 % kWarps * Lane::kWarpBytes : 0;
      raw.scales[j] = load_shared_bytes<Lane::kBytes>(row + first + Lane::byte_of(j));
    }
  }
}

template <typename Format>
__device__ __forceinline__ void read_rope(uint4& rope, uint32_t slot) {
  using Bytes = UnitBytes<Format>;
  if constexpr (!RopeUnit<Format>::kNone) {
    rope = load_shared(slot + Bytes::kCodes + Bytes::kScales + threadIdx.x % 32 * 16);
  }
}

}  // namespace flashmla::sm90::sparse::wide
