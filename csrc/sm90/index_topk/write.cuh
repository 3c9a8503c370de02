// Writes what is selected of the candidates, in the order of positions.
#pragma once

#include "sm90/index_topk/keys.cuh"
#include "sm90/index_topk/sums.cuh"

namespace flashmla::sm90::index_topk {

// Where a row's results go, and its blocks.
struct Output {
  int32_t *indices, *positions;
  const int32_t* table;
  int topk;

  __device__ __forceinline__ void write(int place, int token) const {
    indices[place] = table[token / 64] * 64 + token % 64;
    positions[place] = token;
  }
  // All places from `count` on; every stride-th thread's.
  __device__ __forceinline__ void fill(int count, int thread, int stride) const {
    for (int i = count + thread; i < topk; i += stride) indices[i] = positions[i] = -1;
  }
};

// How many are selected where so many keys are above the threshold and equal to it.
__device__ __forceinline__ int selected_of(Counts counts, const Threshold& threshold) {
  return counts.above + min(counts.equal, threshold.equal);
}

// By all threads of the row's first block, which has all candidates.
__device__ __forceinline__ void write_candidates(const Output& output, SharedStorage& smem,
                                                 const Candidate* candidates, int count,
                                                 const Threshold& threshold) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const uint32_t lower_lanes = (1u << lane) - 1;
  const int share = (count + kThreads - 1) / kThreads * 32;
  const int begin = min(warp * share, count), end = min(begin + share, count);
  Counts counts{};
  for (int i = begin + lane; i < end; i += 32) {
    const uint32_t key = candidates[i].key;
    counts.above += key > threshold.key, counts.equal += key == threshold.key;
  }
  counts = sum_lanes(counts);
  if (lane == 0) smem.warp_counts[warp] = counts;
  __syncthreads();
  const Counts of_lane = lane < kWarps ? smem.warp_counts[lane] : Counts{};
  Counts before = sum_lanes(lane < warp ? of_lane : Counts{});
  for (int base = begin; base < end; base += 32) {
    const int i = base + lane;
    const Candidate x = i < end ? candidates[i] : Candidate{};
    const bool is_above = x.key > threshold.key, is_equal = i < end && x.key == threshold.key;
    const uint32_t above = __ballot_sync(~0u, is_above), equal = __ballot_sync(~0u, is_equal);
    const Counts mine = before + Counts{__popc(above & lower_lanes), __popc(equal & lower_lanes)};
    if (is_above || (is_equal && mine.equal < threshold.equal)) {
      output.write(selected_of(mine, threshold), x.token);
    }
    before = before + Counts{__popc(above), __popc(equal)};
  }
  output.fill(selected_of(sum_lanes(of_lane), threshold), threadIdx.x, kThreads);
}

}  // namespace flashmla::sm90::index_topk
