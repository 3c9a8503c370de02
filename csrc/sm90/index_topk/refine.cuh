// The need-th highest of the scores that a block holds.
#pragma once

#include "sm90/index_topk/held.cuh"
#include "sm90/index_topk/threshold.cuh"

namespace flashmla::sm90::index_topk {

// All that reach a score, if no more of those that equal it are there than may be selected.
__device__ __forceinline__ Threshold threshold_at(float score, int equal, int may_be) {
  return may_be >= equal ? Threshold{below(score), 0} : Threshold{score, may_be};
}

// Of smem.close[0, count) the need-th highest.
__device__ __forceinline__ Threshold rank_close(SharedStorage& smem, int count, int need) {
  if (static_cast<int>(threadIdx.x) < count) {
    const float score = smem.close[threadIdx.x];
    Counts counts{};
    for (int i = 0; i < count; i += 4) {
      const float4 four = *reinterpret_cast<const float4*>(&smem.close[i]);
      const float others[] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        counts.above += i + k < count && others[k] > score;
        counts.equal += i + k < count && others[k] == score;
      }
    }
    if (counts.above < need && need <= counts.above + counts.equal) {
      // By all that are equal.
      smem.threshold = threshold_at(score, counts.equal, need - counts.above);
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
    float places[kQuads][4];
    held.for_each([&](float score, int i, int k) {
      places[i][k] = bins.place(score);
      bins.count(smem, places[i][k]);
    });
    __syncthreads();
    const Found found = find_bin(smem, smem.bins, need);
    if (found.bin < 0) return kAll;
    if (found.within <= kThreads) {
      const float place = bins.place_of(found.bin);
      bool any = false;
      held.for_each([&](float, int i, int k) { any |= places[i][k] == place; });
      if (any) {  // of few threads
        held.for_each([&](float score, int i, int k) {
          append_if(places[i][k] == place, close, num_close, score);
        });
      }
      __syncthreads();
      return rank_close(smem, found.within, need - found.above);
    }
    clear_bins(smem);
    __syncthreads();
  }
  return find_threshold(smem, 0, 21, need, 1, nullptr, [&](const auto& visit) {
    held.for_each([&](float score, int, int) {
      if (const uint32_t key = key_of(score)) visit(key);
    });
  });
}

}  // namespace flashmla::sm90::index_topk
