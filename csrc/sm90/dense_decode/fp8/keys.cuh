// S^T = K Q^T by a score warpgroup.
#pragma once

#include "sm90/attention/partial.cuh"
#include "sm90/dense_decode/fp8/formats.cuh"
#include "sm90/dense_decode/fp8/shared_storage.cuh"
#include "sm90/formats/fragments.cuh"
#include "sm90/ptx/barrier.cuh"
#include "sm90/ptx/matrix.cuh"
#include "sm90/ptx/smem_desc.cuh"
#include "sm90/ptx/wgmma.cuh"

namespace flashmla::sm90::dense_decode::fp8 {

// Of a thread's two tokens, lane / 4 and lane / 4 + 8 of its warp's sixteen, the exponent of the
// largest scale: keys are taken relative to it, and products with them multiplied by it.
struct TokenExponents {
  int of[2];
};

// Address of a field of the first token's row. tile: in shared memory.
template <typename Format>
__device__ __forceinline__ uint32_t token_address(uint32_t tile, int offset) {
  const int thread = reread_thread();
  const int token = thread / 32 % kWarps * kWarpTokens + thread % 32 / 4;
  return tile + token * Format::kRowBytes + offset;
}

template <typename Format>
__device__ __forceinline__ TokenExponents find_exponents(uint32_t tile) {
  const uint32_t scales = token_address<Format>(tile, Format::kScaleOffset);
  TokenExponents exponents;
#pragma unroll
  for (int m = 0; m < 2; ++m) {
    const uint4 v = load_shared(scales + m * 8 * Format::kRowBytes);
    exponents.of[m] =
        token_exponent(fmaxf(fmaxf(fabsf(__uint_as_float(v.x)), fabsf(__uint_as_float(v.y))),
                             fmaxf(fabsf(__uint_as_float(v.z)), fabsf(__uint_as_float(v.w)))));
  }
  return exponents;
}

// What keys of a group of columns are to be multiplied with, f16 twice.
template <typename Format>
__device__ __forceinline__ void load_factors(uint32_t (&factor)[2], uint32_t tile, int group,
                                             const TokenExponents& exponents) {
  const uint32_t scale = token_address<Format>(tile, Format::kScaleOffset + group * 4);
#pragma unroll
  for (int m = 0; m < 2; ++m) {
    factor[m] =
        f16_twice(load_scale(scale + m * 8 * Format::kRowBytes) * power_of_two(-exponents.of[m]));
  }
}

// Puts the tile's scales where the value warps read them: lanes of a quad have a group each. left:
// tokens of the sequence from the tile's first on; others count as zeros. Returns whether there are
// scales that one factor does not hold.
template <typename Format, typename Storage>
__device__ __forceinline__ bool store_scales(Storage& smem, int stage, int slot, int left) {
  const int thread = reread_thread(), warp = thread / 32 % kWarps, token = thread % 32 / 4;
  const int group = thread % 4;
  const uint32_t row =
      token_address<Format>(smem_address(smem.ring[stage]), Format::kScaleOffset + group * 4);
  const int first = warp * kWarpTokens + token;
  const float low = first < left ? load_scale(row) : 0.0f;
  const float high = first + 8 < left ? load_scale(row + 8 * Format::kRowBytes) : 0.0f;
  const uint32_t value =
      pack<__nv_bfloat16>(clamp_scale(low) * kPlaced, clamp_scale(high) * kPlaced);
  uint16_t* const target =
      smem.scales[slot][group] + warp / 2 * 32 + token / 2 * 8 + warp % 2 * 4 + token % 2;
  target[0] = value & 0xffff;
  target[2] = value >> 16;
  return __any_sync(~0u, is_large(low) || is_large(high));
}

constexpr int kUnits = kHeadDim / 16;  // products of a tile, sixteen columns each
constexpr int kLatentUnits = kValueDim / 16;
template <int kRows>
constexpr int kKeyBuffers = kRows == 64 ? 4 : 6;  // of their fragments

template <typename Format, int kRows>
__device__ __forceinline__ void compute_scores(float (&s)[kRows / 2],
                                               const SharedStorage<Format, kRows>& smem, int stage,
                                               const TokenExponents& exponents) {
  constexpr int kBuffers = kKeyBuffers<kRows>;
  constexpr int kStep = kRows * kChunkRowBytes / 16;  // of an operand, for 64 columns
  const int thread = reread_thread(), lane = thread % 32;
  const uint32_t tile = smem_address(smem.ring[stage]);
  const uint32_t rows =
      tile + Format::offset_at(thread / 32 % kWarps * kWarpTokens + lane % 16) + lane / 16 * 16;
  uint32_t a[kBuffers][4], raw[2][2];  // raw: of two units
  const uint32_t query = operand_at(smem.query[0]);
  const auto load_units = [&](int unit) {  // or one of 16-bit columns
    constexpr int kRopeUnit = Format::kScales ? 32 : 16;
    if (unit >= kUnits) return;
    load_matrix_x4(
        *reinterpret_cast<uint32_t (*)[4]>(raw),
        rows + (unit < kLatentUnits ? unit * 16
                                    : Format::kRopeOffset + (unit - kLatentUnits) * kRopeUnit));
  };
  uint32_t factor[2];
  load_units(0);
  pin_registers(s);
#pragma unroll
  for (int unit = 0; unit < kUnits; ++unit) {
    uint32_t (&keys)[4] = a[unit % kBuffers];
    if constexpr (Format::kScales) {
      if (unit % 8 == 0 && unit < kLatentUnits) {
        load_factors<Format>(factor, tile, unit / 8, exponents);
      }
    }
    if (unit >= kBuffers) wgmma_wait<kBuffers - 1>();
    if constexpr (Format::kScales) {
      if (unit < kLatentUnits) {
        convert_keys(keys, raw[unit % 2], factor);
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          keys[i] =
              multiply_bf16x2(raw[i / 2][i % 2], bf16_twice(power_of_two(-exponents.of[i % 2])));
        }
      }
    } else {
      convert_keys(keys, raw[unit % 2]);
    }
    if (unit % 2 == 1 || (Format::kScales && unit >= kLatentUnits)) load_units(unit + 1);
    wgmma_fence();
    const uint64_t queries = descriptor(query + unit / 4 * kStep + unit % 4 * 2);
    if (unit < kLatentUnits) {
      wgmma_rs<__half>(s, keys, queries, unit > 0);
    } else {
      using Rope = std::conditional_t<Format::kScales, __nv_bfloat16, __half>;
      wgmma_rs<Rope>(s, keys, queries, 1);
    }
    wgmma_commit();
  }
  wgmma_wait<0>();
  pin_registers(s);
}

}  // namespace flashmla::sm90::dense_decode::fp8
