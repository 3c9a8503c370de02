// Storing a value warpgroup's outputs: a piece that is a whole sequence's as its result, others to
// the workspace (sm90/attention/partial.cuh).
#pragma once

#include "sm90/attention/partial.cuh"
#include "sm90/dense_decode/fp8/shared_storage.cuh"
#include "sm90/ptx/barrier.cuh"
#include "sm90/ptx/matrix.cuh"

namespace flashmla::sm90::dense_decode::fp8 {

// A warp has 64 neighbouring value columns: sixteen in each of its warpgroup's products.
template <int kRows>
using Output = float[kValueTiles][kRows / 2];

// Query rows that a thread has.
template <int kRows>
constexpr int kThreadRows = kRows / 4;

// Puts into shared memory the exponents of each row's largest values in this warp, not normalised.
template <int kRows>
__device__ __forceinline__ void find_exponents(uint8_t (&exponent)[kRows][kRoleWarps],
                                               const Output<kRows>& o) {
  const int thread = reread_thread();
  float peak[kThreadRows<kRows>] = {};
#pragma unroll
  for (int m = 0; m < kValueTiles; ++m) {
#pragma unroll
    for (int i = 0; i < kThreadRows<kRows>; ++i) {
      peak[i] = fmaxf(peak[i], fmaxf(fabsf(o[m][element(i, 0)]), fabsf(o[m][element(i, 1)])));
    }
  }
#pragma unroll
  for (int step = 4; step <= 16; step *= 2) {
#pragma unroll
    for (int i = 0; i < kThreadRows<kRows>; ++i)
      peak[i] = fmaxf(peak[i], __shfl_xor_sync(~0u, peak[i], step));
  }
  if (thread % 32 < 4) {
#pragma unroll
    for (int i = 0; i < kThreadRows<kRows>; ++i) {
      exponent[query_row(thread, i)][thread / 32 - kRoleWarps] = __float_as_uint(peak[i]) >> 23;
    }
  }
}

// Of what find_exponents found makes what a row's half is to be multiplied with to be stored, and
// stores the scale that undoes it. By thread `row` of the value warpgroup.
template <typename Storage>
__device__ __forceinline__ float choose_factor(const Storage& smem, int half, int row, bool empty,
                                               float* scale) {
  uint32_t most = *reinterpret_cast<const uint32_t*>(&smem.exponent[row][half * kWarps]);
  most = __vmaxu4(most, most >> 16);
  most = max(most & 0xff, most >> 8 & 0xff);
  const float below = __uint_as_float(most << 23);  // peak < 2 * below
  const float inverse = empty ? 0.0f : smem.inverse_sum[row];
  const int exponent = partial_exponent(below * fabsf(inverse)) + 1;
  if (row < smem.row_tile.count) *scale = power_of_two(exponent);
  return inverse * power_of_two(-exponent);
}

template <typename Format, int kRows>
__device__ __forceinline__ void store_partial(SharedStorage<Format, kRows>& smem,
                                              const Output<kRows>& o, bool empty, float* rows) {
  const int thread = reread_thread(), lane = thread % 32, warp = thread / 32 % kWarps;
  const int half = reread_side(), own = thread % kWarpgroupThreads;
  find_exponents<kRows>(smem.exponent, o);
  named_barrier_sync(kValueBarrier + half, kWarpgroupThreads);  // exponents are there
  if (own < kRows) {
    smem.factor[half][own] = choose_factor(
        smem, half, own, empty, rows + own * kValueDim + partial_scale(kValueDim) + half);
  }
  named_barrier_sync(kValueBarrier + half, kWarpgroupThreads);  // and factors
  // A row's words are 16 bytes for each quad lane of each 32 columns. Lanes g = lane / 4 % 4 and g
  // + 4 have every other word of quad lane g, in both of the warp's groups of 32: the first comes
  // to have all of the first group, the second of the second.
  const bool second = lane / 16;
  const int unit = (half * kWarps + warp) * 8 + second * 4 + lane / 4 % 4;
#pragma unroll
  for (int i = 0; i < kThreadRows<kRows>; ++i) {
    const int row = query_row(thread, i);
    const float factor = smem.factor[half][row];
    uint32_t own[kValueTiles];
#pragma unroll
    for (int m = 0; m < kValueTiles; ++m) {
      own[m] = pack<__half>(o[m][element(i, 0)] * factor, o[m][element(i, 1)] * factor);
    }
    const uint32_t others[2] = {__shfl_xor_sync(~0u, second ? own[0] : own[2], 16),
                                __shfl_xor_sync(~0u, second ? own[1] : own[3], 16)};
    if (row < smem.row_tile.count) {
      reinterpret_cast<uint4*>(rows + row * kValueDim)[unit] =
          second ? uint4{others[0], own[2], others[1], own[3]}
                 : uint4{own[0], others[0], own[1], others[1]};
    }
  }
}

template <typename T, typename Format, int kRows>
__device__ __forceinline__ void store_result(const SharedStorage<Format, kRows>& smem,
                                             const Output<kRows>& o, bool empty, T* rows) {
  const int thread = reread_thread(), lane = thread % 32, warp = thread / 32 % kWarps;
#pragma unroll
  for (int i = 0; i < kThreadRows<kRows>; ++i) {
    const int row = query_row(thread, i);
    const float factor = empty ? 0.0f : smem.inverse_sum[row];
    auto* words =
        reinterpret_cast<uint32_t*>(rows + row * kValueDim + (reread_side() * kWarps + warp) * 64) +
        lane / 4;
#pragma unroll
    for (int m = 0; m < kValueTiles; ++m) {
      const uint32_t v = pack<T>(o[m][element(i, 0)] * factor, o[m][element(i, 1)] * factor);
      if (row < smem.row_tile.count) words[m * 8] = v;
    }
  }
}

}  // namespace flashmla::sm90::dense_decode::fp8
