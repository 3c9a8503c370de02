// Scores that a block holds in its registers, all of which it may select from: those of a short
// row, or of a long one's candidates.
#pragma once

#include "sm90/index_topk/range.cuh"

namespace flashmla::sm90::index_topk {

struct Held {
  float scores[kQuads][4];  // of items first(i) to first(i) + 3; NaN where there is none
  int count;                // the block's items, in the order of positions

  static __device__ __forceinline__ int first(int i) {
    return (i * kThreads + static_cast<int>(threadIdx.x)) * 4;
  }

  __device__ __forceinline__ void load_row(const Slice& row) {
    count = row.count;
    int32_t ids[kQuads];  // of the items' blocks, where they are to be checked
#pragma unroll
    for (int i = 0; i < kQuads; ++i) load_if(first(i) < count, row.scores + first(i), scores[i]);
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
      load_if(first(i) < count && row.check_blocks, row.table + (first(i) >> 6), ids[i]);
    }
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
      const int end = static_cast<uint32_t>(ids[i]) < row.layer_blocks ? count - first(i) : 0;
      if (end >= 4) continue;
#pragma unroll
      for (int k = 0; k < 4; ++k) scores[i][k] = k < end ? scores[i][k] : NAN;
    }
  }

  __device__ __forceinline__ void load_candidates(const Candidates& candidates, int all) {
    count = all;
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
      if (first(i) < count) {
        const float4 four = *reinterpret_cast<const float4*>(candidates.scores + first(i));
        scores[i][0] = four.x, scores[i][1] = four.y, scores[i][2] = four.z, scores[i][3] = four.w;
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) scores[i][k] = first(i) + k < count ? scores[i][k] : NAN;
    }
  }

  // Of all items, and of NaN: visit(scores[i][k], i, k).
  template <typename Visit>
  __device__ __forceinline__ void for_each(const Visit& visit) const {
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
      if (i * kThreads * 4 >= count) break;
#pragma unroll
      for (int k = 0; k < 4; ++k) visit(scores[i][k], i, k);
    }
  }

  // By all threads: the lowest and the highest score, but -inf.
  __device__ __forceinline__ Bound range(SharedStorage& smem) const {
    Range range;
    for_each([&](float score, int, int) { range.add(score); });
    return range.of_block(smem);
  }
};

}  // namespace flashmla::sm90::index_topk
