// Candidates: the tokens whose scores are not below a bound, in the order of positions.
#pragma once

#include "sm90/index_topk/round.cuh"

namespace flashmla::sm90::index_topk {

// By all threads: returns how many there are, none of which is stored if there is no room for all.
// guess() gives the bound, and is called while the first scores are loaded.
template <typename Guess>
__device__ __forceinline__ int collect(SharedStorage& smem, const Slice& slice, const Guess& guess,
                                       const Candidates& candidates) {
  float least = 0;
  int all = 0;
  for (int begin = 0, turn = 0; turn == 0 || begin < slice.count; begin += kRoundTokens, ++turn) {
    Round round;
    round.load(slice, begin);
    if (turn == 0) least = guess();
    const uint32_t mask = round.compare(least);
    const Places places(mask);
    const uint2 sums = sum_warps(__reduce_add_sync(~0u, __popc(mask)), smem.warp_sums[turn & 1]);
    int first = all + sums.x;
    all += sums.y;
    if (all > candidates.room) continue;
    const int token = slice.begin + round.first;
#pragma unroll 1
    for (int i = 0; i * 4 < round.count; ++i) {
      int place = first + places.lower(i);
      for (uint32_t those = mask >> (4 * i) & 15; those != 0; those &= those - 1) {
        candidates.tokens[place++] = token + i * 128 + __ffs(those) - 1;
      }
      first += places.total(i);
    }
  }
  return all;
}

// By all threads of the row's first block.
__device__ __forceinline__ void load_scores(const Slice& row, const Candidates& candidates,
                                            int count) {
  constexpr int kAtOnce = 4;  // loads, which go out before the first one's store
#pragma unroll 1
  for (int first = threadIdx.x; first < count; first += kAtOnce * kThreads) {
    float scores[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const int i = first + k * kThreads;
      scores[k] = i < count ? row.scores[candidates.tokens[i]] : 0;
    }
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const int i = first + k * kThreads;
      if (i < count) candidates.scores[i] = scores[k];
    }
  }
  __syncthreads();
}

}  // namespace flashmla::sm90::index_topk
