// The need-th highest of the scores that a block holds.
#pragma once

#include "sm90/index_topk/held.cuh"
#include "sm90/index_topk/threshold.cuh"

namespace flashmla::sm90::index_topk {

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

// By all threads; bins are clear. Scores below the bound do not count.
__device__ __forceinline__ Threshold refine(SharedStorage& smem, const Held& held, Bound bound,
                                            int need) {
  const EvenBins bins(bound);
  if (bins.exist()) {
    const uint32_t close = smem_address(smem.close), num_close = smem_address(&smem.num_close);
    if (threadIdx.x == 0) smem.num_close = 0;
    held.for_each([&](float score) { bins.count(smem, score); });
    __syncthreads();
    const Found found = find_bin(smem, smem.bins, need);
    if (found.bin < 0) return kAll;
    if (found.within <= kThreads) {
      held.for_each(
          [&](float score) { append_if(bins.bin(score) == found.bin, close, num_close, score); });
      __syncthreads();
      return rank_close(smem, found.within, need - found.above);
    }
    clear_bins(smem);
    __syncthreads();
  }
  return find_threshold(smem, 0, 21, need, 1, nullptr, [&](const auto& visit) {
    held.for_each([&](float score) {
      if (const uint32_t key = key_of(score)) visit(key);
    });
  });
}

}  // namespace flashmla::sm90::index_topk
