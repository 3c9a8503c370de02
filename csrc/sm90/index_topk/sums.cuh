// Sums over a warp.
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

__device__ __forceinline__ Counts operator+(Counts a, Counts b) {
  return {a.above + b.above, a.equal + b.equal};
}

__device__ __forceinline__ Counts sum_lanes(Counts x) {
  return {__reduce_add_sync(~0u, x.above), __reduce_add_sync(~0u, x.equal)};
}

}  // namespace flashmla::sm90::index_topk
