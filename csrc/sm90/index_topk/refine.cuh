// The topk-th highest of the candidates, by the row's first block alone.
#pragma once

#include "sm90/index_topk/threshold.cuh"

namespace flashmla::sm90::index_topk {

// Even bins between two scores: the greater the score, the higher the bin.
struct EvenBins {
  float least, bins_per_unit;

  __device__ EvenBins(uint32_t lowest, uint32_t highest)
      : least(score_of(lowest)), bins_per_unit((kBins - 1) / (score_of(highest) - least)) {}
  // Not if the scores are infinite, almost, or equal.
  __device__ bool exist() const { return bins_per_unit > 0 && bins_per_unit < INFINITY; }
  __device__ __forceinline__ uint32_t bin(uint32_t key) const {
    return min(static_cast<uint32_t>((score_of(key) - least) * bins_per_unit), kBins - 1);
  }
};

// Of smem.bins.close[0, count) the need-th highest.
__device__ __forceinline__ Threshold rank_close(SharedStorage& smem, int count, int need) {
  if (static_cast<int>(threadIdx.x) < count) {
    const uint32_t key = smem.bins.close[threadIdx.x];
    Counts counts{};
    for (int i = 0; i < count; ++i) {
      counts.above += smem.bins.close[i] > key;
      counts.equal += smem.bins.close[i] == key;
    }
    if (counts.above < need && need <= counts.above + counts.equal) {
      smem.threshold = {key, need - counts.above};  // by all that are equal
    }
  }
  __syncthreads();
  return smem.threshold;
}

// By all threads; bins are clear. All candidates' keys are in [lowest, highest], and they are more
// than `need`.
__device__ __forceinline__ Threshold refine(SharedStorage& smem, const Candidate* candidates,
                                            int count, uint32_t lowest, uint32_t highest,
                                            int need) {
  const EvenBins bins(lowest, highest);
  if (bins.exist()) {
    if (threadIdx.x == 0) smem.num_close = 0;
    for (int i = threadIdx.x; i < count; i += kThreads) {
      atomicAdd(&smem.bins.counts[bins.bin(candidates[i].key)], 1);
    }
    __syncthreads();
    const Found found = find_bin(smem, smem.bins.counts, need);
    if (found.within <= kThreads) {
      for (int i = threadIdx.x; i < count; i += kThreads) {
        const uint32_t key = candidates[i].key;
        if (bins.bin(key) == static_cast<uint32_t>(found.bin)) {
          smem.bins.close[atomicAdd(&smem.num_close, 1)] = key;
        }
      }
      __syncthreads();
      return rank_close(smem, found.within, need - found.above);
    }
    clear_bins(smem);
    __syncthreads();
  }
  const int shift = max(21 - __clz(highest - lowest), 0);
  return find_threshold(smem, lowest, shift, need, 1, [&](const auto& visit) {
    for (int i = threadIdx.x; i < count; i += kThreads) visit(candidates[i].key);
  });
}

}  // namespace flashmla::sm90::index_topk
