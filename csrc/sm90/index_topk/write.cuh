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

  static __device__ __forceinline__ Output of_row(const KernelArgs& args, uint32_t sequence,
                                                  int query) {
    const int64_t first = (int64_t{sequence} * args.s_q + query) * args.topk;
    return {.indices = args.indices + first,
            .positions = args.positions + first,
            .table = args.block_table + int64_t{sequence} * args.max_blocks,
            .topk = args.topk};
  }
  // block: that of the token.
  __device__ __forceinline__ void write(int place, int token, int block) const {
    indices[place] = block * 64 + (token & 63);
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

// Where a block's selected items stand in the order of positions: quad by quad of all threads.
struct HeldPlaces {
  int first[kQuads];  // the place of the thread's first of each quad
  int all;

  // mask: bit 4 i + k says whether item k of quad i counts.
  __device__ __forceinline__ HeldPlaces(uint32_t mask, uint32_t (&of_warps)[kWarps]) {
    static_assert(kQuads == 4 && kHeldScores / kQuads < 1 << 16, "two counts in 32 bits");
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const uint32_t pairs = mask - (mask >> 1 & 0x5555);
    const uint32_t fours = (pairs & 0x3333) + (pairs >> 2 & 0x3333);
    // A byte for each of quads 0 2 1 3: at most 128 in a warp.
    const uint32_t mine = (fours & 0x0F0F) | (fours & 0xF0F0) << 12;
    uint32_t up_to = mine;
#pragma unroll
    for (int i = 1; i < 32; i *= 2) {
      const uint32_t lower = __shfl_up_sync(~0u, up_to, i);
      if (lane >= i) up_to += lower;
    }
    if (lane == 31) of_warps[warp] = up_to;
    __syncthreads();
    const uint32_t of_lane = lane < kWarps ? of_warps[lane] : 0;
    const uint32_t even = of_lane & 0x00FF00FF, odd = of_lane >> 8 & 0x00FF00FF;  // 0 1, 2 3
    const uint32_t all_even = __reduce_add_sync(~0u, even), all_odd = __reduce_add_sync(~0u, odd);
    const uint32_t before_even = __reduce_add_sync(~0u, lane < warp ? even : 0);
    const uint32_t before_odd = __reduce_add_sync(~0u, lane < warp ? odd : 0);
    const uint32_t lower = up_to - mine;
    const int first_two = (all_even & 0xFFFF) + (all_even >> 16);
    first[0] = (before_even & 0xFFFF) + (lower & 255);
    first[1] = (all_even & 0xFFFF) + (before_even >> 16) + (lower >> 16 & 255);
    first[2] = first_two + (before_odd & 0xFFFF) + (lower >> 8 & 255);
    first[3] = first_two + (all_odd & 0xFFFF) + (before_odd >> 16) + (lower >> 24);
    all = first_two + (all_odd & 0xFFFF) + (all_odd >> 16);
  }
};

// Bit 4 i + k: whether the thread's item k of quad i is selected.
__device__ __forceinline__ uint32_t mark_selected(SharedStorage& smem, const Held& held,
                                                  const Threshold& threshold) {
  uint32_t mask = 0;
  held.for_each(
      [&](float score, int i, int k) { mask |= uint32_t{score > threshold.score} << (4 * i + k); });
  if (threshold.equal == 0) return mask;
  uint32_t equal = 0;
  held.for_each([&](float score, int i, int k) {
    equal |= uint32_t{score == threshold.score} << (4 * i + k);
  });
  HeldPlaces places(equal, smem.warp_sums[0]);
#pragma unroll
  for (int i = 0; i < kQuads; ++i) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const uint32_t bit = equal & 1u << (4 * i + k);
      if (bit != 0 && places.first[i]++ < threshold.equal) mask |= bit;
    }
  }
  return mask;
}

// By all threads of the block that holds all scores that may be selected: those that are, into
// smem.selected. Returns how many.
__device__ __forceinline__ int select_held(SharedStorage& smem, const Held& held,
                                           const Threshold& threshold) {
  const uint32_t mask = mark_selected(smem, held, threshold);
  const HeldPlaces places(mask, smem.warp_sums[1]);
#pragma unroll
  for (int i = 0; i < kQuads; ++i) {
    if (i * kThreads * 4 >= held.count) break;
    uint32_t place = smem_address(&smem.selected[places.first[i]]);
#pragma unroll
    for (int k = 0; k < 4; ++k) push_if(mask & 1u << (4 * i + k), place, Held::first(i) + k);
  }
  __syncthreads();
  return places.all;
}

// Writes them; token_of(item) and block_of(token) tell what.
template <typename TokenOf, typename BlockOf>
__device__ __forceinline__ void write_selected(const Output& output, const SharedStorage& smem,
                                               int selected, const TokenOf& token_of,
                                               const BlockOf& block_of) {
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
