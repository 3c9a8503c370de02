// The wide fp8 kernel: up to 64 packed query rows against one part's share of the cache.
//
// Three warpgroups, as in the wide kernel over 16-bit rows: one computes scores and softmax, two
// multiply probabilities with the left and the right half of the value columns. Their warps bring
// raw rows into the slot of the ring in which they convert them to 16 bit.
#pragma once

#include "sm90/dense_decode/fp8/wide/scores.cuh"
#include "sm90/dense_decode/fp8/wide/values.cuh"
#include "sm90/host/launch.h"

namespace flashmla::sm90::dense_decode::fp8::wide {

// Grid: (row tiles, num_parts): blocks that read the same tokens are neighbours.
__global__ void __launch_bounds__(kWideThreads, 1)
    fp8_wide_kernel(const __grid_constant__ WideArgs args) {
  extern __shared__ __align__(1024) uint8_t dynamic_shared[];
  // Addressed by a constant.
  auto& smem = *static_cast<WideStorage*>(__cvta_shared_to_generic(kSharedBase));
  if (smem_address(dynamic_shared) != kSharedBase) __trap();

  if (threadIdx.x == 0) {
    prefetch_tensor_map(&args.query_half_map);
    prefetch_tensor_map(&args.query_rope_map);
    prefetch_tensor_map(&args.code_map);
    prefetch_tensor_map(&args.rest_map);
    for (int i = 0; i < kValueWarps; ++i) {
      mbarrier_init(smem_address(&smem.brought[0][i]), 1);
      mbarrier_init(smem_address(&smem.brought[1][i]), 1);
    }
    for (int i = 0; i < kStages; ++i) {
      mbarrier_init(smem_address(&smem.full[i]), kValueWarps);
      mbarrier_init(smem_address(&smem.scores_done[i]), kWarps);
      mbarrier_init(smem_address(&smem.probabilities_stored[i]), kWarps);
      mbarrier_init(smem_address(&smem.values_go[i]), kWarps);
      mbarrier_init(smem_address(&smem.load_done[i]), kValueWarps);
    }
    mbarrier_init_fence();
  }
  wait_for_prerequisites();
  launch_dependents();
  if (threadIdx.x == 0) {
    smem.begin = load_cut(args.cuts, blockIdx.y, args.b);
    smem.end = load_cut(args.cuts, blockIdx.y + 1, args.b);
  }
  __syncthreads();
  if (threadIdx.x / kWarpgroupThreads == 0) {
    raise_registers<kWideScoreRegisters>();
    run_scores(args, smem);
  } else {
    lower_registers<kWideValueRegisters>();
    run_values(args, smem);
  }
}

}  // namespace flashmla::sm90::dense_decode::fp8::wide
