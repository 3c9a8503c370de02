// The range of a block's scores, and even bins over it.
#pragma once

#include <cfloat>

#include "sm90/index_topk/keys.cuh"

namespace flashmla::sm90::index_topk {

// Lower bound of the scores that count, and about the highest of them.
struct Bound {
  float least, highest;
};
constexpr Bound kNoBound{-FLT_MAX, -FLT_MAX};  // of finite scores

// Only finite scores count.
struct Range {
  float lowest = INFINITY, highest = -INFINITY;

  __device__ __forceinline__ void add(float score) {
    const float finite = fmaf(score, 0.0f, score);  // else NaN, which minima and maxima pass over
    lowest = fminf(lowest, finite);
    highest = fmaxf(highest, finite);
  }

  // By all threads.
  __device__ __forceinline__ Bound of_block(SharedStorage& smem) const {
    const bool any = highest > -INFINITY;
    uint32_t low = any ? key_of(lowest) : ~0u, high = any ? key_of(highest) : 0;
    low = __reduce_min_sync(~0u, low), high = __reduce_max_sync(~0u, high);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (lane == 0) smem.warp_lowest[warp] = low, smem.warp_highest[warp] = high;
    __syncthreads();
    low = __reduce_min_sync(~0u, lane < kWarps ? smem.warp_lowest[lane] : ~0u);
    high = __reduce_max_sync(~0u, lane < kWarps ? smem.warp_highest[lane] : 0);
    return high == 0 ? kNoBound : Bound{score_of(low), score_of(high)};
  }
};

// Even bins over a range: the greater the score, the higher the bin, also of those above it.
struct EvenBins {
  float least, width, bins_per_unit;

  __device__ __forceinline__ explicit EvenBins(Bound bound)
      : least(bound.least), width((bound.highest - bound.least) * (1.0f / (kBins - 1))) {
    bins_per_unit = __fdividef(1.0f, width);
  }
  // Not if the scores are infinite, almost, or equal.
  __device__ __forceinline__ bool exist() const {
    return bins_per_unit > 0 && bins_per_unit < INFINITY;
  }
  // A score's bin as a float that has no fractions, kFirst being bin 0: conversions would take four
  // times as long. Before the first if the score is below the range (by more than half a bin) or
  // NaN.
  static constexpr float kFirst = (1 << 23) + 1;
  __device__ __forceinline__ float place(float score) const {
    const float sum = fmaf(score - least, bins_per_unit, kFirst);
    return fminf(fmaxf(sum, kFirst - 1), kFirst + (kBins - 1));
  }
  static __device__ __forceinline__ float place_of(int bin) { return kFirst + bin; }
  // bins[-1] is there, too: a branch for each score that does not count would take longer.
  static __device__ __forceinline__ void count(SharedStorage& smem, float place) {
    atomicAdd(smem.bins + (__float_as_int(place) - __float_as_int(kFirst)), 1);
  }
  // About the least score of the bin.
  __device__ __forceinline__ float edge(int bin) const { return least + (bin - 0.5f) * width; }
};

}  // namespace flashmla::sm90::index_topk
