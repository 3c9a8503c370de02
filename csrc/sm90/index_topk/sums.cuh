// Sums over a warp and over a block.
#pragma once

#include "sm90/index_topk/shared_storage.cuh"

namespace flashmla::sm90::index_topk {

__device__ __forceinline__ int inclusive_warp_sum(int x) {
#pragma unroll
  for (int i = 1; i < 32; i *= 2) {
    const int lower = __shfl_up_sync(~0u, x, i);
    if (static_cast<int>(threadIdx.x % 32) >= i) x += lower;
  }
  return x;
}

// Of each warp's `x` the sum over earlier warps, and over all; one barrier. of_warps: two turns'
// differ.
__device__ __forceinline__ uint2 sum_warps(uint32_t x, uint32_t (&of_warps)[kWarps]) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (lane == 0) of_warps[warp] = x;
  __syncthreads();
  const uint32_t of_lane = lane < kWarps ? of_warps[lane] : 0;
  return {__reduce_add_sync(~0u, lane < warp ? of_lane : 0), __reduce_add_sync(~0u, of_lane)};
}

__device__ __forceinline__ Counts operator+(Counts a, Counts b) {
  return {a.above + b.above, a.equal + b.equal};
}

__device__ __forceinline__ Counts sum_lanes(Counts x) {
  return {__reduce_add_sync(~0u, x.above), __reduce_add_sync(~0u, x.equal)};
}

}  // namespace flashmla::sm90::index_topk
