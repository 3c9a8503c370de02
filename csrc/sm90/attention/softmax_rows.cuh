// The online softmax of a tile's scores, 64 rows by 64 tokens, by one warpgroup: as wgmma leaves
// them, a thread has rows lane / 4 and lane / 4 + 8 of its warp's sixteen, and of each row tokens
// 2 (lane % 4) and the next of every eight.
#pragma once

#include "sm90/attention/softmax.cuh"
#include "sm90/ptx/barrier.cuh"
#include "sm90/ptx/matrix.cuh"
#include "sm90/ptx/smem_desc.cuh"
#include "sm90/ptx/warpgroup.h"

namespace flashmla::sm90 {

constexpr int kSoftmaxRows = 64;

// Running state of this thread's two rows, lane / 4 and lane / 4 + 8 of the warp's 16.
struct SoftmaxRows {
  float reference[2] = {-INFINITY, -INFINITY};  // base-2 exponent that maps to 1
  float sum[2] = {0.0f, 0.0f};                  // this thread's columns only
};

// The largest of this thread's scores of each of its rows.
__device__ __forceinline__ void find_peaks(const float (&s)[32], float (&peak)[2]) {
  peak[0] = peak[1] = -INFINITY;
#pragma unroll
  for (int i = 0; i < 32; i += 4) {
    peak[0] = fmaxf(peak[0], fmaxf(s[i], s[i + 1]));
    peak[1] = fmaxf(peak[1], fmaxf(s[i + 2], s[i + 3]));
  }
}

// Moves the rows' references where their maxima ask for it, and tells the value warpgroups. Past a
// sequence's first tiles that is seldom, and the maxima over other lanes' columns are not needed.
// peak: this thread's; overwritten. kHuge: for scores of any size.
template <bool kHuge = false>
__device__ __forceinline__ void raise_references(uint8_t (&rescale)[kSoftmaxRows], float (&peak)[2],
                                                 SoftmaxRows& rows, float scale_log2) {
  int power[2] = {0, 0};
  if (__any_sync(~0u, outgrows(peak[0], scale_log2, rows.reference[0]) ||
                          outgrows(peak[1], scale_log2, rows.reference[1]))) [[unlikely]] {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int lane = 1; lane <= 2; lane *= 2) {
        peak[r] = fmaxf(peak[r], __shfl_xor_sync(~0u, peak[r], lane));
      }
      if constexpr (kHuge) {
        power[r] = raise_reference(rows.reference[r], peak[r] * scale_log2);
        rows.sum[r] *= rescale_factor(power[r]);
      } else {
        power[r] = raise_reference(rows.reference[r], rows.sum[r], peak[r] * scale_log2);
      }
    }
  }
  const int thread = threadIdx.x % kWarpgroupThreads;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    // The four lanes of a row all write the same.
    rescale[thread / 32 * 16 + thread % 32 / 4 + 8 * r] = power[r];
  }
}

template <bool kHuge = false>
__device__ __forceinline__ void update_references(uint8_t (&rescale)[kSoftmaxRows],
                                                  const float (&s)[32], SoftmaxRows& rows,
                                                  float scale_log2) {
  float peak[2];
  find_peaks(s, peak);
  raise_references<kHuge>(rescale, peak, rows, scale_log2);
}

template <bool kHuge>
__device__ __forceinline__ float less_reference(float score, float scale_log2, float offset) {
  if constexpr (kHuge) return __fsub_rn(__fmul_rn(score, scale_log2), offset);
  return fmaf(score, scale_log2, -offset);
}

// Turns scores into probabilities, adds them to the rows' sums and stores them to `target` (a chunk
// in the 128-byte swizzle) once the phase of `free` is complete. kHuge: products are rounded before
// the reference is subtracted, so that the largest of huge scores, less itself, is 0.
template <typename T, bool kHuge>
__device__ __forceinline__ void store_probabilities(float (&s)[32], SoftmaxRows& rows,
                                                    float scale_log2, uint32_t target,
                                                    uint32_t free, uint32_t parity) {
  const int lane = threadIdx.x % 32;
  const int row = (threadIdx.x % kWarpgroupThreads) / 32 * 16 + (lane & 15);
  const float offset[2] = {finite_reference(rows.reference[0]),
                           finite_reference(rows.reference[1])};
  float sum[2][2] = {};
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    uint32_t packed[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {  // row j % 2, columns 16 k + 8 (j / 2) and the next
      float& low = s[8 * k + 2 * j];
      float& high = s[8 * k + 2 * j + 1];
      low = exp2_approx(less_reference<kHuge>(low, scale_log2, offset[j % 2]));
      high = exp2_approx(less_reference<kHuge>(high, scale_log2, offset[j % 2]));
      sum[j % 2][0] += low;
      sum[j % 2][1] += high;
      packed[j] = pack<T>(low, high);
    }
    if (k == 0) mbarrier_wait(free, parity);
    store_matrix_x4(target + swizzled_offset(row, k * 2 + lane / 16), packed[0], packed[1],
                    packed[2], packed[3]);
  }
  rows.sum[0] += sum[0][0] + sum[0][1];
  rows.sum[1] += sum[1][0] + sum[1][1];
}

// The rows' sums over all columns, and their inverses for the value warpgroups.
__device__ __forceinline__ void finish_sums(float (&inverse_sum)[kSoftmaxRows], SoftmaxRows& rows) {
  const int lane = threadIdx.x % 32, row = threadIdx.x % kWarpgroupThreads / 32 * 16 + lane / 4;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    rows.sum[r] += __shfl_xor_sync(~0u, rows.sum[r], 1);
    rows.sum[r] += __shfl_xor_sync(~0u, rows.sum[r], 2);
    const float inverse = inverse_of_sum(rows.sum[r]);
    if (lane % 4 == 0) inverse_sum[row + 8 * r] = inverse;
  }
}

// Stores the first `count` rows' log-sum-exps, from their finished sums: base 2 if partial, else
// natural.
__device__ __forceinline__ void store_lse(float* target, int count, const SoftmaxRows& rows,
                                          bool partial) {
  const int lane = threadIdx.x % 32, row = threadIdx.x % kWarpgroupThreads / 32 * 16 + lane / 4;
  if (lane % 4 != 0) return;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float lse = row_lse(rows.reference[r], rows.sum[r], partial);
    if (row + 8 * r < count) target[row + 8 * r] = lse;
  }
}

}  // namespace flashmla::sm90
