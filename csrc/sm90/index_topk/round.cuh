// Up to kRoundTokens scores in a block's registers.
#pragma once

#include "sm90/index_topk/keys.cuh"
#include "sm90/index_topk/sums.cuh"

namespace flashmla::sm90::index_topk {

// A warp has a run of up to kSteps times 128 tokens, a thread four of each 128.
struct Round {
  float scores[kSteps][4];  // NaN where there is no token, but not within four of which one is
  int steps;                // the block's, up to kSteps
  int first;                // this thread's first token, of the slice; then every 128th four
  int count;                // its tokens, of the first count / 4 steps and count % 4 of the next
  uint32_t in_layer;        // bit 2 i: whether the block of step i's tokens is

  __device__ __forceinline__ void load(const Slice& slice, int begin) {
    const int lane = threadIdx.x % 32;
    steps = (min(slice.count - begin, kRoundTokens) + 128 * kWarps - 1) / (128 * kWarps);
    const int run = begin + static_cast<int>(threadIdx.x / 32) * steps * 128;
    const int end = min(slice.count, run + steps * 128);
    first = run + lane * 4;
    const int whole = first + 3 < end ? (end - first - 4) / 128 + 1 : 0;
    count = whole * 4 + min(max(end - first - whole * 128, 0), 3);
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      load_if(i * 4 < count, slice.scores + first + i * 128, scores[i]);
    }
    in_layer = ~0u;
    if (slice.check_blocks) {  // a lane looks at one of the run's blocks
      const int block = run + lane * 64;
      in_layer = __ballot_sync(~0u, block < end && slice.in_layer(block)) >> lane / 16;
    }
  }

  // Bit 4 i + k: whether scores[i][k] is at least `least`.
  __device__ __forceinline__ uint32_t compare(float least) const {
    uint32_t mask = 0;
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
#pragma unroll
      for (int k = 0; k < 4; ++k) mask |= (scores[i][k] >= least) << (4 * i + k);
    }
    if (in_layer != ~0u) {
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        if (!(in_layer >> (2 * i) & 1)) mask &= ~(15u << (4 * i));
      }
    }
    return count < 32 ? mask & ((1u << count) - 1) : mask;
  }
};

// Where in the order of positions the first of a thread's tokens of each step stands among its
// warp's, bits 4 i .. 4 i + 3 of `mask` being whether tokens of step i count.
struct Places {
  uint32_t even, odd;  // a byte for each of steps 0 2 4 6, and 1 3 5 7

  __device__ __forceinline__ explicit Places(uint32_t mask) {
    static_assert(kSteps == 8);
    const uint32_t pairs = mask - (mask >> 1 & 0x55555555);
    const uint32_t fours = (pairs & 0x33333333) + (pairs >> 2 & 0x33333333);
    const uint32_t my_even = fours & 0x0F0F0F0F, my_odd = fours >> 4 & 0x0F0F0F0F;
    even = my_even, odd = my_odd;
#pragma unroll
    for (int i = 1; i < 32; i *= 2) {  // at most 128 each
      const uint32_t lower_even = __shfl_up_sync(~0u, even, i);
      const uint32_t lower_odd = __shfl_up_sync(~0u, odd, i);
      if (threadIdx.x % 32 >= i) even += lower_even, odd += lower_odd;
    }
    total_even = __shfl_sync(~0u, even, 31), total_odd = __shfl_sync(~0u, odd, 31);
    even -= my_even, odd -= my_odd;
  }

  // Of step i among the step's, and the step's number.
  __device__ __forceinline__ int lower(int i) const {
    return (i % 2 ? odd : even) >> (i / 2 * 8) & 255;
  }
  __device__ __forceinline__ int total(int i) const {
    return (i % 2 ? total_odd : total_even) >> (i / 2 * 8) & 255;
  }

 private:
  uint32_t total_even, total_odd;
};

}  // namespace flashmla::sm90::index_topk
