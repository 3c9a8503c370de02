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

  // block: that of the token.
  __device__ __forceinline__ void write(int place, int token, int block) const {
    indices[place] = block * 64 + token % 64;
    positions[place] = token;
  }
  // All places from `count` on; every stride-th thread's.
  __device__ __forceinline__ void fill(int count, int thread, int stride) const {
    for (int i = count + thread; i < topk; i += stride) indices[i] = positions[i] = -1;
  }
};

// How many are selected where so many scores are above the threshold and equal to it.
__device__ __forceinline__ int selected_of(Counts counts, const Threshold& threshold) {
  return counts.above + min(counts.equal, threshold.equal);
}

// By all threads of the row's first block, which has all candidates. A thread takes a run of them.
__device__ __forceinline__ void write_candidates(const Output& output, SharedStorage& smem,
                                                 const Candidates& candidates, int count,
                                                 const Threshold& threshold) {
  static_assert(candidate_room(kMaxTopk, INT64_MAX) < 1 << 15, "two counts in 32 bits");
  const int share = (count + kThreads - 1) / kThreads;
  const int begin = min(static_cast<int>(threadIdx.x) * share, count);
  const int end = min(begin + share, count);
  uint32_t counts = 0;  // above, and equal << 16
  for (int i = begin; i < end; ++i) {
    const float score = candidates.scores[i];
    counts += (score > threshold.score) + ((score == threshold.score) << 16);
  }
  const uint32_t up_to = inclusive_warp_sum(counts);
  const uint2 sums = sum_warps(__shfl_sync(~0u, up_to, 31), smem.warp_sums[1]);
  const uint32_t before = sums.x + up_to - counts;
  Counts mine{static_cast<int>(before & 0xFFFF), static_cast<int>(before >> 16)};
  for (int i = begin; i < end; ++i) {
    const float score = candidates.scores[i];
    const bool is_above = score > threshold.score, is_equal = score == threshold.score;
    if (is_above || (is_equal && mine.equal < threshold.equal)) {
      smem.selected[selected_of(mine, threshold)] = candidates.tokens[i];
    }
    mine.above += is_above, mine.equal += is_equal;
  }
  __syncthreads();
  const Counts all{static_cast<int>(sums.y & 0xFFFF), static_cast<int>(sums.y >> 16)};
  const int selected = selected_of(all, threshold);
  constexpr int kAtOnce = 4;  // loads, which go out before the first one's stores
#pragma unroll 1
  for (int first = threadIdx.x; first < selected; first += kAtOnce * kThreads) {
    int token[kAtOnce], block[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const int i = first + k * kThreads;
      token[k] = i < selected ? smem.selected[i] : 0;
      block[k] = i < selected ? output.table[token[k] / 64] : 0;
    }
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const int i = first + k * kThreads;
      if (i < selected) output.write(i, token[k], block[k]);
    }
  }
  output.fill(selected, threadIdx.x, kThreads);
}

}  // namespace flashmla::sm90::index_topk
