// A guess at what the topk-th highest score is at least, from a sample of the row. Whatever it is,
// the result is right: candidates are counted, and where they are too few or too many, the topk-th
// highest is found without it.
#pragma once

#include <cfloat>

#include "sm90/index_topk/keys.cuh"

namespace flashmla::sm90::index_topk {

// Lower bound of the candidates, and about the highest of them.
struct Bound {
  float least, highest;
};
constexpr Bound kNoBound{-FLT_MAX, -FLT_MAX};  // of finite scores

// Scores of a row at even distances, a thread's in its own column of shared memory, which only the
// thread itself reads: one of 64 tokens, but at least 512 and at most 4096.
struct Sample {
  static_assert(candidate_room(1, 0) * 8 >= 512 * sizeof(float));
  static_assert(candidate_room(1, 65536) * 8 >= 4096 * sizeof(float));
  float* scores;  // [2^shift / kThreads][kThreads]
  int shift;

  static __device__ __forceinline__ Sample of_row(float* room, int seen) {
    return {room, min(max(25 - __clz(seen), 9), 12)};
  }
  __device__ __forceinline__ int size() const { return 1 << shift; }

  __device__ __forceinline__ int token(const Slice& row, int i) const {
    return static_cast<int>(static_cast<uint64_t>(i) * row.count >> shift);
  }

  // A thread's first scores and their blocks, which are on their way.
  struct Asked {
    float scores[4];
    uint32_t blocks[4];
  };
  __device__ __forceinline__ Asked ask(const Slice& row) const {
    Asked asked;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int i = k * kThreads + threadIdx.x, at = token(row, i);
      asked.scores[k] = NAN, asked.blocks[k] = 0;
      if (i < size()) {
        asked.scores[k] = row.scores[at];
        if (row.check_blocks) asked.blocks[k] = row.table[at / 64];
      }
    }
    return asked;
  }
  __device__ __forceinline__ void load(const Slice& row, const Asked& asked) const {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int i = k * kThreads + threadIdx.x;
      const bool in_layer = !row.check_blocks || asked.blocks[k] < row.layer_blocks;
      if (i < size()) scores[i] = in_layer ? asked.scores[k] : NAN;
    }
#pragma unroll 1
    for (int i = 4 * kThreads + threadIdx.x; i < size(); i += kThreads) {
      scores[i] = row.score(token(row, i));
    }
  }

  __device__ __forceinline__ int count_from(float least) const {
    int count = 0;
    for (int i = threadIdx.x; i < size(); i += kThreads) {
      count += __syncthreads_count(scores[i] >= least);
    }
    return count;
  }

  // The scores between which to look.
  __device__ __forceinline__ Bound range(SharedStorage& smem) const {
    uint32_t lowest = ~0u, highest = 0;
    for (int i = threadIdx.x; i < size(); i += kThreads) {
      const uint32_t key = key_of(scores[i]);
      if (key != 0) lowest = min(lowest, key), highest = max(highest, key);
    }
    lowest = __reduce_min_sync(~0u, lowest), highest = __reduce_max_sync(~0u, highest);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (lane == 0) smem.warp_lowest[warp] = lowest, smem.warp_highest[warp] = highest;
    __syncthreads();
    lowest = __reduce_min_sync(~0u, lane < kWarps ? smem.warp_lowest[lane] : ~0u);
    highest = __reduce_max_sync(~0u, lane < kWarps ? smem.warp_highest[lane] : 0);
    return highest == 0 ? kNoBound : Bound{score_of(lowest), score_of(highest)};
  }
};

// By all threads. A score that about topk of the row's `seen` and four standard deviations more
// reach, if the sample is like the row. Halves the range of scores, then that of their keys.
__device__ __forceinline__ Bound guess_bound(SharedStorage& smem, const Sample& sample, int seen,
                                             int topk) {
  constexpr int kLinear = 10, kSearch = 26;
  const float share = static_cast<float>(topk) / seen, mean = share * sample.size();
  const int rank = static_cast<int>(mean + 4 * sqrtf(mean * (1 - share))) + 2;
  const int most = rank + rank / 8 + 1;
  const Bound range = sample.range(smem);
  Bound bound{-FLT_MAX, range.highest};
  float low = range.least, high = range.highest;
  for (int i = 0; i < kSearch; ++i) {
    float middle = 0.5f * low + 0.5f * high;
    if (i >= kLinear) {
      const uint32_t from = key_of(low), to = key_of(high);
      middle = score_of(from + (to - from) / 2);
    }
    if (!(low < middle && middle < high)) break;
    const int count = sample.count_from(middle);
    if (count < rank) {
      high = middle;
    } else {
      bound.least = low = middle;
      if (count <= most) break;
    }
  }
  return bound;
}

}  // namespace flashmla::sm90::index_topk
