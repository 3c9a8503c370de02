// Candidates: the tokens whose scores are not below a bound, in the order of positions.
#pragma once

#include "sm90/index_topk/round.cuh"

namespace flashmla::sm90::index_topk {

// By all threads: returns how many there are, none of which is stored if there is no room for all.
// guess() gives the bound, and is called while the first scores are loaded.
template <int kWarps, typename Guess>
__device__ __forceinline__ int collect(SharedStorage& smem, const Slice& slice, const Guess& guess,
                                       const Candidates& candidates) {
  float least = 0;
  int all = 0;
  for (int begin = 0, turn = 0; turn == 0 || begin < slice.count;
       begin += round_tokens(kWarps), ++turn) {
    Round<kWarps> round;
    round.load(slice, begin);
    if (turn == 0) least = guess();
    const uint32_t mask = round.compare(least);
    const Places places(mask);
    const uint2 sums =
        sum_warps<kWarps>(__reduce_add_sync(~0u, __popc(mask)), smem.warp_sums[turn & 1]);
    int first = all + sums.x;
    all += sums.y;
    if (all > candidates.room) continue;
    const int token = slice.begin + round.first;
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      if (i * 4 >= round.count) break;
      int place = first + places.lower(i);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        if (mask >> (4 * i + k) & 1) {
          candidates.scores[place] = round.scores[i][k];
          candidates.tokens[place] = token + i * 128 + k;
          ++place;
        }
      }
      first += places.total(i);
    }
  }
  return all;
}

}  // namespace flashmla::sm90::index_topk
