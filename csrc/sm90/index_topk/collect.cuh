// Candidates: the tokens whose scores are not below a bound, in the order of positions.
#pragma once

#include "sm90/index_topk/round.cuh"
#include "sm90/ptx/cluster.cuh"

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

// All blocks' candidates, one after the other, into the first block's room, if there is room for
// them and they are at least `need`. Returns their tally, in all blocks.
__device__ __forceinline__ Tally gather(SharedStorage& smem, Tally mine,
                                        const Candidate* candidates, uint32_t blocks, int need,
                                        int room) {
  const uint32_t rank = cluster_rank(), lane = threadIdx.x % 32;
  if (threadIdx.x < blocks) {
    store_cluster(map_shared(smem_address(&smem.block_tallies[rank]), threadIdx.x),
                  uint2{static_cast<uint32_t>(mine.candidates), mine.highest});
  }
  cluster_sync();
  const Tally of_rank = lane < blocks ? smem.block_tallies[lane] : Tally{};
  const Tally all{__reduce_add_sync(~0u, of_rank.candidates),
                  __reduce_max_sync(~0u, of_rank.highest)};
  const int earlier = __reduce_add_sync(~0u, lane < rank ? of_rank.candidates : 0);
  if (all.candidates < need || all.candidates > room) return all;
  if (rank > 0) {
    const uint32_t target = map_shared(smem_address(candidates + earlier), 0);
    for (int i = threadIdx.x; i < mine.candidates; i += kThreads) {
      const Candidate x = candidates[i];
      store_cluster(target + i * sizeof(Candidate), uint2{x.key, static_cast<uint32_t>(x.token)});
    }
  }
  cluster_sync();
  return all;
}

}  // namespace flashmla::sm90::index_topk
