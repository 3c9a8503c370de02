// Storing rows of an output tile whose columns two warpgroups share: 256 of 512 each, 64 rows by
// 256 columns f32 in 128 registers as wgmma leaves them.
#pragma once

#include "sm90/attention/partial.cuh"
#include "sm90/ptx/matrix.cuh"

namespace flashmla::sm90 {

constexpr int kStoredColumns = 512;

// Transposes a 4x4 of words between the four lanes of a quad: lane i's v[j] becomes lane j's v[i].
__device__ __forceinline__ void transpose_quad(uint32_t (&v)[4]) {
  const bool odd = threadIdx.x & 1, upper = threadIdx.x & 2;
#pragma unroll
  for (int j = 0; j < 4; j += 2) {
    const uint32_t other = __shfl_xor_sync(~0u, odd ? v[j] : v[j + 1], 1);
    if (odd)
      v[j] = other;
    else
      v[j + 1] = other;
  }
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const uint32_t other = __shfl_xor_sync(~0u, upper ? v[j] : v[j + 2], 2);
    if (upper)
      v[j] = other;
    else
      v[j + 2] = other;
  }
}

// Writes the normalised half of o's row r in 16 bit; target: the half row's first column. A lane
// holds two neighbours of each 8 columns; quads exchange them so that a lane stores 8 at once.
template <typename T>
__device__ __forceinline__ void store_half_row(T* target, const float (&o)[128], int r,
                                               float inverse_sum, bool valid) {
  target += threadIdx.x % 4 * 8;
#pragma unroll
  for (int i = 0; i < 32; i += 4) {
    uint32_t v[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      v[j] =
          pack<T>(o[4 * (i + j) + 2 * r] * inverse_sum, o[4 * (i + j) + 2 * r + 1] * inverse_sum);
    }
    transpose_quad(v);
    if (valid) *reinterpret_cast<uint4*>(target + i * 8) = uint4{v[0], v[1], v[2], v[3]};
  }
}

// Writes the half row of a partial piece to its row of the workspace (partial.cuh).
__device__ __forceinline__ void store_partial_half_row(float* row, const float (&o)[128], int r,
                                                       int half, float inverse_sum, bool valid) {
  float peaks[4] = {};
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    peaks[i % 4] = fmaxf(peaks[i % 4], fmaxf(fabsf(o[4 * i + 2 * r]), fabsf(o[4 * i + 2 * r + 1])));
  }
  float peak = fmaxf(fmaxf(peaks[0], peaks[1]), fmaxf(peaks[2], peaks[3]));
  peak = fmaxf(peak, __shfl_xor_sync(~0u, peak, 1));
  peak = fmaxf(peak, __shfl_xor_sync(~0u, peak, 2));
  if (!valid) return;
  const int exponent = partial_exponent(peak * inverse_sum);
  const float factor = inverse_sum * power_of_two(-exponent);
  const int quad_lane = threadIdx.x % 4;
  auto* target = reinterpret_cast<uint4*>(row);
#pragma unroll
  for (int i = 0; i < 32; i += 4) {
    uint32_t v[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      v[j] = pack<__half>(o[4 * (i + j) + 2 * r] * factor, o[4 * (i + j) + 2 * r + 1] * factor);
    }
    target[half * 32 + i + quad_lane] = uint4{v[0], v[1], v[2], v[3]};
  }
  if (quad_lane == 0) {
    row[partial_scale(kStoredColumns) + half] = power_of_two(exponent);
  }
}

// Zeros, of whichever type, for a row of a piece without keys, whose o is undefined.
__device__ __forceinline__ void store_zero_half_row(uint4* target, bool partial, int half,
                                                    bool valid) {
  if (!valid) return;
  const int quad_lane = threadIdx.x % 4;
#pragma unroll 1
  for (int i = 0; i < 32; i += 4) target[half * 32 + i + quad_lane] = uint4{};
  if (partial && quad_lane == 0)
    reinterpret_cast<float*>(target)[partial_scale(kStoredColumns) + half] = 1.0f;
}

}  // namespace flashmla::sm90
