// Storing a value warpgroup's outputs: a piece that is a whole sequence's as its result, others to
// the workspace (sm90/attention/partial.cuh).
#pragma once

#include "sm90/attention/partial.cuh"
#include "sm90/dense_decode/fp8/shared_storage.cuh"
#include "sm90/ptx/barrier.cuh"
#include "sm90/ptx/matrix.cuh"

namespace flashmla::sm90::dense_decode::fp8 {

// Of each of a warpgroup's tiles of 64 value columns; a warp has sixteen columns of each.
template <int kRows>
using Output = float[kValueTiles][kRows / 2];

// Query rows that a thread has.
template <int kRows>
constexpr int kThreadRows = kRows / 4;

// Eight query rows of a tile, times their factors, in 16 bit and turned back: a quad has a row, and
// a lane four neighbours of the warp's sixteen columns.
template <typename V, int kRows>
__device__ __forceinline__ uint2 scale_and_turn(const float (&tile)[kRows / 2], int n,
                                                float2 factor) {
  uint32_t v[2];  // of even columns, of odd ones
#pragma unroll
  for (int m = 0; m < 2; ++m) {
    v[m] = transpose_matrix(
        pack<V>(tile[element(2 * n, m)] * factor.x, tile[element(2 * n + 1, m)] * factor.y));
  }
  return {__byte_perm(v[0], v[1], 0x5410), __byte_perm(v[0], v[1], 0x7632)};
}

// The factors of this thread's two rows of the eight from row 8 n on.
__device__ __forceinline__ float2 load_factors(const float* of_rows, int n) {
  return *reinterpret_cast<const float2*>(of_rows + query_row(reread_thread(), 2 * n));
}

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
#pragma unroll
  for (int n = 0; n < kRows / 8; ++n) {
    const float2 factor = load_factors(smem.factor[half], n);
    const int row = n * 8 + lane / 4;
    // Half of the 16 bytes that the quad's lane `place` keeps of each 32 columns: a pair of the
    // warp's first eight columns, and of the second. Two lanes have what two lanes store.
    const bool upper = lane & 2;
    const int place = lane % 2 * 2 + upper;
    auto* target = reinterpret_cast<uint2*>(rows + row * kValueDim) +
                   (half * (kValueTiles * 8) + warp / 2 * 4 + place) * 2 + warp % 2;
#pragma unroll
    for (int m = 0; m < kValueTiles; ++m) {
      const uint2 v = scale_and_turn<__half, kRows>(o[m], n, factor);
      const uint32_t other = __shfl_xor_sync(~0u, upper ? v.x : v.y, 2);
      if (row < smem.row_tile.count) {
        target[m * 16] = upper ? uint2{other, v.y} : uint2{v.x, other};
      }
    }
  }
}

template <typename T, typename Format, int kRows>
__device__ __forceinline__ void store_result(const SharedStorage<Format, kRows>& smem,
                                             const Output<kRows>& o, bool empty, T* rows) {
  const int thread = reread_thread(), lane = thread % 32, warp = thread / 32 % kWarps;
#pragma unroll
  for (int n = 0; n < kRows / 8; ++n) {
    const float2 factor = empty ? float2{} : load_factors(smem.inverse_sum, n);
    const int row = n * 8 + lane / 4;
    T* const target =
        rows + row * kValueDim + reread_side() * (kValueTiles * 64) + warp * 16 + lane % 4 * 4;
#pragma unroll
    for (int m = 0; m < kValueTiles; ++m) {
      const uint2 v = scale_and_turn<T, kRows>(o[m], n, factor);
      if (row < smem.row_tile.count) *reinterpret_cast<uint2*>(target + m * 64) = v;
    }
  }
}

}  // namespace flashmla::sm90::dense_decode::fp8
