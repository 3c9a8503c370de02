// Candidates: the tokens whose scores are not below a bound, in the order of positions.
#pragma once

#include "sm90/index_topk/round.cuh"

namespace flashmla::sm90::index_topk {

// By all threads. guess() gives the bound, and is called while the first scores are loaded. `room`
// is for candidate_room(topk) candidates; the tally counts those beyond, too.
template <typename Guess>
__device__ __forceinline__ Tally collect(SharedStorage& smem, const Slice& slice,
                                         const Guess& guess, Candidate* candidates, int room) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float least = 0;
  Tally all{};
  for (int begin = 0, turn = 0; turn == 0 || begin < slice.count; begin += kRoundTokens, ++turn) {
    Round round;
    round.load(slice, begin);
    if (turn == 0) least = score_of(guess());
    const uint32_t mask = round.compare(least);
    Tally* const tallies = smem.warp_tallies[turn & 1];
    const Tally mine{__reduce_add_sync(~0u, __popc(mask)),
                     __reduce_max_sync(~0u, key_of(round.highest()))};
    if (lane == 0) tallies[warp] = mine;
    const Places places(mask);
    __syncthreads();
    const Tally of_lane = lane < kWarps ? tallies[lane] : Tally{};
    int first = all.candidates + __reduce_add_sync(~0u, lane < warp ? of_lane.candidates : 0);
    all.candidates += __reduce_add_sync(~0u, of_lane.candidates);
    all.highest = max(all.highest, __reduce_max_sync(~0u, of_lane.highest));
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      int place = first + places.lower(i);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        if (mask >> (4 * i + k) & 1) {
          if (place < room) {
            candidates[place] = {key_of(round.scores[i][k]),
                                 slice.begin + round.first + i * 128 + k};
          }
          ++place;
        }
      }
      first += places.total(i);
    }
  }
  return all;
}

}  // namespace flashmla::sm90::index_topk
