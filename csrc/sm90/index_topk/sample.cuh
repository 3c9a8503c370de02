// A guess at what the topk-th highest score is at least, from a sample of the row. Whatever it is,
// the result is right: candidates are counted, and where they are too few or too many, the topk-th
// highest is found without it.
#pragma once

#include "sm90/index_topk/keys.cuh"

namespace flashmla::sm90::index_topk {

constexpr int kSearchSteps = 13;

// Scores of the row at even distances, a thread's next to one another in its own column of shared
// memory: only the thread itself reads them.
struct Sample {
  float* scores;  // [per_thread][kThreads]
  int per_thread;

  // One of 64 tokens, but at least 1024 tokens and at most what there is room for: 4096.
  static __device__ Sample of_row(Candidate* room, int seen) {
    static_assert(candidate_room(1) * sizeof(Candidate) >= 8 * kThreads * sizeof(float));
    constexpr int kTokens = 64 * kThreads;
    return {reinterpret_cast<float*>(room), seen < 4 * kTokens ? 2 : seen < 8 * kTokens ? 4 : 8};
  }
  __device__ int size() const { return per_thread * kThreads; }
  __device__ float& score(int i) const { return scores[i * kThreads + threadIdx.x]; }

  // row: of the whole row.
  __device__ void load(const Slice& row, int seen) const {
    for (int i = 0; i < per_thread; ++i) {
      const uint32_t number = i * kThreads + threadIdx.x;
      score(i) = row.score(static_cast<int>(uint64_t{number} * seen >> (per_thread == 2   ? 10
                                                                        : per_thread == 4 ? 11
                                                                                          : 12)));
    }
  }

  __device__ int count_from(uint32_t key) const {
    const float least = score_of(key);
    int count = 0;
    for (int i = 0; i < per_thread; ++i) count += __syncthreads_count(score(i) >= least);
    return count;
  }
};

// By all threads. A key that about topk of the row's `seen` and four standard deviations more are
// not below, if the sample is like the row.
__device__ __forceinline__ uint32_t guess_bound(SharedStorage& smem, const Sample& sample, int seen,
                                                int topk) {
  const float mean = static_cast<float>(topk) * sample.size() / seen;
  const int rank = static_cast<int>(mean + 4 * sqrtf(mean)) + 2;
  if (rank > sample.size()) return kLeastKey;
  uint32_t lowest = ~0u, highest = 0;
  for (int i = 0; i < sample.per_thread; ++i) {
    const uint32_t key = key_of(sample.score(i));
    lowest = min(lowest, key), highest = max(highest, key);
  }
  lowest = __reduce_min_sync(~0u, lowest), highest = __reduce_max_sync(~0u, highest);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (lane == 0) smem.warp_tallies[1][warp] = {static_cast<int>(lowest), highest};
  __syncthreads();
  const Tally of_lane = smem.warp_tallies[1][lane % kWarps];
  // The bound is in [low, high).
  uint32_t low = max(__reduce_min_sync(~0u, static_cast<uint32_t>(of_lane.candidates)), kLeastKey);
  uint32_t high = __reduce_max_sync(~0u, of_lane.highest) + 1;
  for (int i = 0; i < kSearchSteps && high > low + 1; ++i) {
    const uint32_t middle = low + (high - low) / 2;
    (sample.count_from(middle) >= rank ? low : high) = middle;
  }
  return low;
}

}  // namespace flashmla::sm90::index_topk
