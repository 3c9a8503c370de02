// The topk-th highest of the candidates, by the row's first block alone.
#pragma once

#include "sm90/index_topk/sample.cuh"
#include "sm90/index_topk/threshold.cuh"

namespace flashmla::sm90::index_topk {

// Even bins from a bound to about the highest score: the greater the score, the higher the bin.
struct EvenBins {
  float least, bins_per_unit;

  __device__ __forceinline__ explicit EvenBins(Bound bound)
      : least(bound.least), bins_per_unit((kBins - 1) / (bound.highest - bound.least)) {}
  // Not if the scores are infinite, almost, or equal.
  __device__ __forceinline__ bool exist() const {
    return bins_per_unit > 0 && bins_per_unit < INFINITY;
  }
  __device__ __forceinline__ uint32_t bin(float score) const {
    return min(static_cast<uint32_t>((score - least) * bins_per_unit), kBins - 1);
  }
};

// Of smem.close[0, count) the need-th highest.
__device__ __forceinline__ Threshold rank_close(SharedStorage& smem, int count, int need) {
  if (static_cast<int>(threadIdx.x) < count) {
    const float score = smem.close[threadIdx.x];
    Counts counts{};
    for (int i = 0; i < count; ++i) {
      counts.above += smem.close[i] > score;
      counts.equal += smem.close[i] == score;
    }
    if (counts.above < need && need <= counts.above + counts.equal) {
      smem.threshold = {score, need - counts.above};  // by all that are equal
    }
  }
  __syncthreads();
  return smem.threshold;
}

// By all threads; bins are clear. The candidates are more than `need`, and none is below the bound.
__device__ __forceinline__ Threshold refine(SharedStorage& smem, const Candidates& candidates,
                                            int count, Bound bound, int need) {
  const EvenBins bins(bound);
  if (bins.exist()) {
    if (threadIdx.x == 0) smem.num_close = 0;
#pragma unroll 1
    for (int i = threadIdx.x; i < count; i += kThreads) {
      atomicAdd(&smem.bins[bins.bin(candidates.scores[i])], 1);
    }
    __syncthreads();
    const Found found = find_bin(smem, smem.bins, need);
    if (found.within <= kThreads) {
#pragma unroll 1
      for (int i = threadIdx.x; i < count; i += kThreads) {
        const float score = candidates.scores[i];
        if (bins.bin(score) == static_cast<uint32_t>(found.bin)) {
          smem.close[atomicAdd(&smem.num_close, 1)] = score;
        }
      }
      __syncthreads();
      return rank_close(smem, found.within, need - found.above);
    }
    clear_bins(smem);
    __syncthreads();
  }
  return find_threshold(smem, 0, 21, need, 1, nullptr, [&](const auto& visit) {
    for (int i = threadIdx.x; i < count; i += kThreads) visit(key_of(candidates.scores[i]));
  });
}

}  // namespace flashmla::sm90::index_topk
