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
    const uint32_t scores = smem_address(candidates.scores);
    const uint32_t tokens = smem_address(candidates.tokens);
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      if (i >= round.steps) break;
      uint32_t place = (first + places.lower(i)) * 4;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const bool is_candidate = mask >> (4 * i + k) & 1;
        store_if(is_candidate, scores + place, round.scores[i][k]);
        store_if(is_candidate, tokens + place, token + i * 128 + k);
        place += is_candidate ? 4 : 0;
      }
      first += places.total(i);
    }
  }
  return all;
}

}  // namespace flashmla::sm90::index_topk
