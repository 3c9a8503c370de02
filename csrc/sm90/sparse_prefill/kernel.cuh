// The sparse prefill kernel: up to 64 heads of one query token after another
// against the rows that its indices name.
//
// Three warpgroups: one computes scores and softmax, two multiply probabilities
// with the left and the right half of the value columns, and gather rows into a
// ring of three tiles in shared memory, which runs on from query token to query
// token. Tile t's journey:
//
//   score  | S = Q K^T (t)  | softmax (t) -> P | S (t+1)      | softmax (t+1)
//   ... values |                                   ... | O += P V (t) | gather
//   t+3
#pragma once

#include "sm90/host/launch.h"
#include "sm90/sparse_prefill/kernels.h"
#include "sm90/sparse_prefill/scores.cuh"
#include "sm90/sparse_prefill/values.cuh"

namespace flashmla::sm90::sparse_prefill {

// Grid: (head tiles, blocks): blocks that read the same rows are neighbours.
template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kThreads, 1)
    sparse_prefill_kernel(const __grid_constant__ KernelArgs args) {
  extern __shared__ __align__(1024) uint8_t dynamic_shared[];
  // Addressed by a constant.
  auto& smem = *static_cast<SharedStorage*>(__cvta_shared_to_generic(kSharedBase));
  if (smem_address(dynamic_shared) != kSharedBase) __trap();

  if (threadIdx.x == 0) {
    prefetch_tensor_map(&args.query_half_map);
    prefetch_tensor_map(&args.query_rope_map);
    for (int i = 0; i < kStages; ++i) {
      // Of each gathering thread its copies, of each warp which tokens are attended.
      mbarrier_init(smem_address(&smem.full[i]), 2 * kWarpgroupThreads + kGatherWarps);
      mbarrier_init(smem_address(&smem.probabilities_stored[i]), kWarpgroupWarps);
      mbarrier_init(smem_address(&smem.values_go[i]), kWarpgroupWarps);
      mbarrier_init(smem_address(&smem.load_done[i]), kGatherWarps);
    }
    mbarrier_init(smem_address(&smem.scores_done), kWarpgroupWarps);
    for (uint8_t& odd : smem.odd_query) odd = 0;
    mbarrier_init_fence();
  }
  wait_for_prerequisites();
  launch_dependents();
  __syncthreads();
  if (threadIdx.x / kWarpgroupThreads == 0) {
    raise_registers<kScoreRegisters>();
    run_scores<T, (kHeadDim > kValueDim)>(args, smem);
  } else {
    lower_registers<kValueRegisters>();
    run_values<T, kHeadDim>(args, smem);
  }
}

template <typename T, int kHeadDim>
Status launch_kernel(const KernelArgs& args, dim3 grid, cudaStream_t stream) {
  return launch(sparse_prefill_kernel<T, kHeadDim>,
                {grid, kThreads, sizeof(SharedStorage), /*dependent=*/true}, stream,
                "sparse_prefill", args);
}

}  // namespace flashmla::sm90::sparse_prefill
