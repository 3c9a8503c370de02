// Writes what is selected of the candidates, in the order of positions.
#pragma once

#include "sm90/index_topk/held.cuh"
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

// By all threads of the block that holds all scores that may be selected. token_of(item) and
// block_of(token) tell what is written.
template <typename TokenOf, typename BlockOf>
__device__ __forceinline__ void write_held(const Output& output, SharedStorage& smem,
                                           const Held& held, const Threshold& threshold,
                                           const TokenOf& token_of, const BlockOf& block_of) {
  static_assert(kHeldScores < 1 << 15, "two counts in 32 bits");
  static_assert(kQuads == 4, "a thread's 16 items, in order");
#pragma unroll
  for (int i = 0; i < kQuads; ++i) {
    uint32_t marks = 0;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      marks |= (held.scores[i][k] > threshold.score) << k;
      marks |= (held.scores[i][k] == threshold.score) << (8 + k);
    }
    marks |= __shfl_down_sync(~0u, marks, 1) << 4;
    if (threadIdx.x % 2 == 0) smem.marks[Held::first(i) / 8] = static_cast<uint16_t>(marks);
  }
  __syncthreads();
  const uint32_t marks = reinterpret_cast<const uint32_t*>(smem.marks)[threadIdx.x];
  const uint32_t above = __byte_perm(marks, 0, 0x4420);
  uint32_t equal = __byte_perm(marks, 0, 0x4431);
  const uint32_t counts = __popc(above) | __popc(equal) << 16;
  const uint32_t up_to = inclusive_warp_sum(counts);
  const uint2 sums = sum_warps(__shfl_sync(~0u, up_to, 31), smem.warp_sums[1]);
  const uint32_t before = sums.x + up_to - counts;
  const Counts earlier{static_cast<int>(before & 0xFFFF), static_cast<int>(before >> 16)};
  for (int room = max(threshold.equal - earlier.equal, 0); __popc(equal) > room;) {
    equal ^= 1u << (31 - __clz(equal));  // the last one
  }
  int place = selected_of(earlier, threshold);
  for (uint32_t those = above | equal; those != 0; those &= those - 1) {
    smem.selected[place++] = static_cast<int>(threadIdx.x) * 16 + __ffs(those) - 1;
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
      token[k] = i < selected ? token_of(smem.selected[i]) : 0;
      block[k] = i < selected ? block_of(token[k]) : 0;
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
