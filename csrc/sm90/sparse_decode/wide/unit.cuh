// Four rows of a tile, which one warp converts: their latent columns as they lie, in registers, and
// as 16-bit columns.
//
// A lane has four pieces of sixteen columns, two rows by turns, so that the eight lanes that store
// at once reach all banks. The rows' scales are spread over the lanes.
#pragma once

#include "sm90/ptx/cluster.cuh"
#include "sm90/ptx/smem_desc.cuh"
#include "sm90/sparse_decode/wide/config.h"
#include "sm90/sparse_decode/wide/piece.cuh"

namespace flashmla::sm90::sparse::wide {

constexpr int kUnitPieces = kUnitRows * kValueDim / kPieceColumns / 32;  // of a lane

// A lane's row of a unit, and piece of the row. kShift: of the odd rows' pieces, so that the eight
// lanes that load at once reach all banks too.
__device__ __forceinline__ int unit_row(int i) { return i / 2 * 2 + (threadIdx.x / 4 & 1); }
template <int kShift>
__device__ __forceinline__ int unit_piece(int i) {
  const int piece = threadIdx.x % 32 / 8 * 4 + threadIdx.x % 4 + (threadIdx.x / 4 & 1) * kShift;
  return piece ^ i % 2 * 16;
}

// Whether piece `i` holds no codes: v4's last four are rope columns.
template <typename Format>
__device__ __forceinline__ bool is_tail(int i) {
  return Format::kCodeColumns < kValueDim && i % 2 == 1 &&
         unit_piece<0>(i) >= Format::kCodeColumns / kPieceColumns;
}

struct RawUnit {
  uint4 codes[kUnitPieces];
  uint32_t scales;
};

// Where the scales of a unit are.
template <typename Format, int kShift>
struct UnitScales {
  static constexpr int kOfRow = kValueDim / Format::kGroup;  // stored ones
  static constexpr int kOfLane = kOfRow > 8 ? kOfRow / 8 : 1;
  static constexpr int kRowLanes = kOfRow / kOfLane;
  static __device__ __forceinline__ int lane_row() {
    return threadIdx.x % 32 / kRowLanes % kUnitRows;
  }
  static __device__ __forceinline__ int lane_group() { return threadIdx.x % kRowLanes * kOfLane; }
  // The lane that has the scale of piece `i`, and its place there.
  static __device__ __forceinline__ int lane_of(int i) {
    return unit_row(i) * kRowLanes +
           unit_piece<kShift>(i) * kPieceColumns / Format::kGroup / kOfLane;
  }
  static __device__ __forceinline__ int place_of(int i) {
    return unit_piece<kShift>(i) * kPieceColumns / Format::kGroup % kOfLane;
  }
};

// A unit's rows in global memory.
template <typename Format, typename AnyPlan>
struct GlobalRows {
  static constexpr int kShift = 0;
  const AnyPlan& plan;
  int first;  // token of the tile

  __device__ __forceinline__ uint4 load_16(int row, int byte) const {
    return wide::load_16(plan.row[first + row] + byte);
  }
  __device__ __forceinline__ uint2 load_8(int row, int byte) const {
    return wide::load_8(plan.row[first + row] + byte);
  }
  template <int kBytes>
  __device__ __forceinline__ uint32_t load_scales(int row, int byte) const {
    const uint8_t* scales;
    if constexpr (Format::kTwoPlanes)
      scales = plan.scales[first + row];
    else
      scales = plan.row[first + row] + Format::kScaleOffset;
    return load_bytes<kBytes>(scales + byte);
  }
};

// Bulk copies put them end to end, which for most formats is a bank's width more than a multiple of
// all banks'.
template <typename Format>
constexpr int kSharedShift = Format::kRowBytes / 16 % 8 == 1 ? 3 : 0;

// A unit's rows in a slot of the ring.
template <typename Format, int kShiftOf>
struct SharedRows {
  static constexpr int kShift = kShiftOf;
  uint32_t slot;

  __device__ __forceinline__ uint4 load_16(int row, int byte) const {
    return load_shared(slot + row * Format::kRowBytes + byte);
  }
  __device__ __forceinline__ uint2 load_8(int row, int byte) const {
    return load_shared_8(slot + row * Format::kRowBytes + byte);
  }
  template <int kBytes>
  __device__ __forceinline__ uint32_t load_scales(int row, int byte) const {
    constexpr int kAt = Format::kTwoPlanes ? kUnitRows * Format::kRowBytes : Format::kScaleOffset;
    constexpr int kStride = Format::kTwoPlanes ? Format::kScaleBytes : Format::kRowBytes;
    return load_shared_bytes<kBytes>(slot + kAt + row * kStride + byte);
  }
};

template <typename Format, typename Rows>
__device__ __forceinline__ void load_unit(RawUnit& raw, const Rows& rows) {
  constexpr int kShift = Rows::kShift;
#pragma unroll
  for (int i = 0; i < kUnitPieces; ++i) {
    if constexpr (Format::kCodes == Codes::kE2M1) {
      const uint2 half = rows.load_8(unit_row(i), unit_piece<kShift>(i) * 8);
      raw.codes[i] = {half.x, half.y, 0, 0};
    } else {
      raw.codes[i] = {};
      if (!is_tail<Format>(i)) {
        raw.codes[i] = rows.load_16(unit_row(i), unit_piece<kShift>(i) * 16);
      }
    }
  }
  if constexpr (Format::kScales != Scales::kNone) {
    using Lanes = UnitScales<Format, kShift>;
    constexpr int kBytes = Format::kScales == Scales::kFloat32 ? 4 : 1;
    raw.scales = rows.template load_scales<kBytes * Lanes::kOfLane>(Lanes::lane_row(),
                                                                    Lanes::lane_group() * kBytes);
  }
}

// The bits of the lane's own scale `j`.
template <typename Format>
__device__ __forceinline__ uint32_t scale_bits(uint32_t scales, int j) {
  if constexpr (Format::kScales == Scales::kFloat32) return scales;
  const bool pad = Format::kCodeColumns < kValueDim &&
                   UnitScales<Format, 0>::lane_group() >= Format::kCodeColumns / Format::kGroup;
  return pad ? 0 : scales >> 8 * j & 0xff;
}

// What conversion leaves for mend_unit: seldom anything.
struct Mend {
  bool needed;      // in any of the warp's lanes
  uint32_t nan;     // bit i: piece i has a NaN code
  uint32_t scales;  // as the unit had them
};

template <typename Format>
__device__ __forceinline__ Mend find_special(const RawUnit& raw) {
  Mend mend{false, 0, raw.scales};
#pragma unroll
  for (int i = 0; i < kUnitPieces; ++i) {
    const uint4& codes = raw.codes[i];
    const uint32_t nan =
        find_nan(codes.x) | find_nan(codes.y) | find_nan(codes.z) | find_nan(codes.w);
    mend.nan |= (nan & 0x80808080) != 0 ? 1 << i : 0;
  }
  bool special = mend.nan != 0;
  if constexpr (Format::kScales != Scales::kNone) {
#pragma unroll
    for (int j = 0; j < UnitScales<Format, 0>::kOfLane; ++j) {
      special |= is_large(scale_value<Format::kScales>(scale_bits<Format>(raw.scales, j)));
    }
  }
  mend.needed = __any_sync(~0u, special);
  return mend;
}

// The factors of the lane's pieces: every lane computes its own scales' and they are exchanged.
template <typename T, typename Format, int kShift>
__device__ __forceinline__ void unit_factors(uint32_t (&factors)[kUnitPieces], uint32_t scales) {
  if constexpr (Format::kScales == Scales::kNone) {
#pragma unroll
    for (int i = 0; i < kUnitPieces; ++i) factors[i] = scale_factor<T, Format::kCodes>(1.0f);
  } else {
    using Lanes = UnitScales<Format, kShift>;
    constexpr int kWords = (Lanes::kOfLane + 1) / 2;
    uint32_t own[kWords];
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      const auto factor = [&](int j) {
        return scale_factor<T, Format::kCodes>(
            scale_value<Format::kScales>(scale_bits<Format>(scales, j)));
      };
      own[w] = factor(2 * w);
      if constexpr (Lanes::kOfLane > 1) own[w] = permute(own[w], factor(2 * w + 1), 0x5410);
    }
#pragma unroll
    for (int i = 0; i < kUnitPieces; ++i) {
      const int place = Lanes::place_of(i);
      factors[i] = __shfl_sync(~0u, own[0], Lanes::lane_of(i));
      if constexpr (kWords == 2) {
        const uint32_t upper = __shfl_sync(~0u, own[1], Lanes::lane_of(i));
        if (place / 2 == 1) factors[i] = upper;
      }
      if constexpr (Lanes::kOfLane > 1) {
        factors[i] = permute(factors[i], 0, place % 2 == 1 ? 0x3232 : 0x1010);
      }
    }
  }
}

// The lane's pieces to 16 bit.
template <typename T, typename Format, int kShift>
__device__ __forceinline__ Mend convert_unit(uint32_t (&columns)[kUnitPieces][8],
                                             const RawUnit& raw) {
  Mend mend{};
  if constexpr (Format::kCodes == Codes::kE4M3 && std::is_same_v<T, __nv_bfloat16>) {
    mend = find_special<Format>(raw);
  }
  uint32_t factors[kUnitPieces];
  unit_factors<T, Format, kShift>(factors, raw.scales);
#pragma unroll
  for (int i = 0; i < kUnitPieces; ++i) {
    if constexpr (Format::kCodes == Codes::kE2M1)
      convert_nibbles<T>(columns[i], {raw.codes[i].x, raw.codes[i].y}, factors[i]);
    else
      convert_codes<T>(columns[i], raw.codes[i], factors[i]);
  }
  // Here: before a wait that follows, and before what they were is loaded anew.
#pragma unroll
  for (int i = 0; i < kUnitPieces * 8; ++i) asm volatile("" : "+r"(columns[i / 8][i % 8]));
  return mend;
}

}  // namespace flashmla::sm90::sparse::wide
