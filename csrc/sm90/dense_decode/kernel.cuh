// Paged MLA decode for 64 packed query rows against one part's share of the cache.
//
// Three warpgroups: one computes scores and softmax, two multiply probabilities with the left and the
// right half of the value columns. Latent tiles pass through a ring of three in shared memory, loaded
// by TMA. Tile t's journey:
//
//   score  | S = Q K^T (t)  | softmax (t) -> P | S (t+1)      | softmax (t+1) ...
//   values |                                   ... | O += P V (t)             | refill slot of t
//
// docs/dense_decode.md tells the whole story.
#pragma once

#include "../common/launch.h"
#include "score.cuh"
#include "values.cuh"

namespace flashmla::sm90 {

// Grid: (ceil(s_q * group / 64), h_kv, num_parts): blocks that read the same tokens are neighbours.
template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    dense_decode_kernel(const __grid_constant__ KernelArgs args) {
  extern __shared__ SharedStorage shared_storage[];
  SharedStorage& smem = shared_storage[0];

  if (threadIdx.x == 0) {
    prefetch_tensor_map(&args.half_map);
    prefetch_tensor_map(&args.rope_map);
    for (int i = 0; i < kStages; ++i) {
      mbarrier_init(smem_address(&smem.latent_full[0][i]), 1);
      mbarrier_init(smem_address(&smem.latent_full[1][i]), 1);
    }
    for (int i = 0; i < 2; ++i) {
      mbarrier_init(smem_address(&smem.rope_full[i]), 1);
      mbarrier_init(smem_address(&smem.scores_done[i]), kWarpgroupThreads / 32);
      mbarrier_init(smem_address(&smem.probabilities_stored[i]), kWarpgroupThreads / 32);
      mbarrier_init(smem_address(&smem.values_go[i]), kWarpgroupThreads / 32);
      mbarrier_init(smem_address(&smem.values_done[i]), 2 * kWarpgroupThreads / 32);
    }
    mbarrier_init_fence();
  }
  if (threadIdx.x < kTileRows) {
    smem.row_offset[threadIdx.x] = row_offset(args, blockIdx.y, blockIdx.x * kTileRows + threadIdx.x);
  }
  __syncthreads();
  wait_for_prerequisites();

  const Cut begin = load_cut(args, blockIdx.z), end = load_cut(args, blockIdx.z + 1);
  const int warpgroup = threadIdx.x / kWarpgroupThreads;
  if (warpgroup == 0) {
    raise_registers<kScoreRegisters>();
    run_scores<T>(args, smem, begin, end);
  } else {
    lower_registers<kValueRegisters>();
    run_values<T>(args, smem, begin, end, warpgroup - 1);
  }
  launch_dependents();
}

}  // namespace flashmla::sm90
