// The wide kernel: at most 64 packed query rows against one part's share of the cache.
//
// Three warpgroups: one computes scores and softmax, two multiply probabilities with the left and
// the right half of the value columns. Latent tiles pass through a ring of three in shared memory.
// Tile t's journey:
//
//   score  | S = Q K^T (t)  | softmax (t) -> P | S (t+1)      | softmax (t+1) ...
//   values |                                   ... | O += P V (t)             | refill slot of t
//
// docs/kernels/dense_decode.md tells the whole story.
#pragma once

#include "sm90/dense_decode/wide/score.cuh"
#include "sm90/dense_decode/wide/values.cuh"
#include "sm90/host/launch.h"

namespace flashmla::sm90::dense_decode::wide {

// Grid: (row tiles, h_kv, num_parts): blocks that read the same tokens are neighbours.
template <typename T, int kBoxes, bool kGiven>
__global__ void __launch_bounds__(kThreads, 1)
    wide_decode_kernel(const __grid_constant__ KernelArgs args) {
  extern __shared__ SharedStorage shared_storage[];
  // Addressed by a constant: the symbol's address would be computed anew, with a long latency, at
  // every use.
  SharedStorage& smem = *static_cast<SharedStorage*>(__cvta_shared_to_generic(kSharedBase));
  if (smem_address(shared_storage) != kSharedBase) __trap();

  if (threadIdx.x == 32) {
    prefetch_tensor_map(&args.query_half_map);
    prefetch_tensor_map(&args.cache_half_map);
    prefetch_tensor_map(&args.query_rope_map);
    prefetch_tensor_map(&args.cache_rope_map);
  }
  wait_for_prerequisites();
  launch_dependents();
  if (threadIdx.x == kLoadingThread) {
    // The cuts are on their way while the barriers are initialised.
    const Cut begin = load_cut(args.cuts, blockIdx.z, args.b),
              end = load_cut(args.cuts, blockIdx.z + 1, args.b);
    for (int i = 0; i < kStages; ++i) {
      mbarrier_init(smem_address(&smem.half_full[0][i]), 1);
      mbarrier_init(smem_address(&smem.half_full[1][i]), 1);
      mbarrier_init(smem_address(&smem.rope_full[i]), 1);
      mbarrier_init(smem_address(&smem.scores_done[i]), kWarpgroupWarps);
      mbarrier_init(smem_address(&smem.probabilities_stored[i]), kWarpgroupWarps);
      mbarrier_init(smem_address(&smem.values_go[i]), kWarpgroupWarps);
      mbarrier_init(smem_address(&smem.load_done[i]), 3 * kWarpgroupWarps);
    }
    mbarrier_init_fence();
    smem.row_tile.find<kTileRows>(blockIdx.x, blockIdx.y, args.rows, args.h_q, args.heads_per_kv);
    smem.begin = begin;
    smem.end = end;
    start_loads<kBoxes>(args, smem);
  }
  __syncthreads();  // the barriers are initialised, row tile and part are known
  const int warpgroup = threadIdx.x / kWarpgroupThreads;
  if (warpgroup == 0) {
    raise_registers<kScoreRegisters>();
    run_scores<T, kGiven>(args, smem);
  } else {
    lower_registers<kValueRegisters>();
    run_values<T, kBoxes>(args, smem, warpgroup - 1);
  }
}

template <typename T, int kBoxes, bool kGiven>
Status launch_kernel(const KernelArgs& args, dim3 grid, cudaStream_t stream) {
  return launch(wide_decode_kernel<T, kBoxes, kGiven>,
                {grid, kThreads, sizeof(SharedStorage), /*dependent=*/true}, stream, "dense_decode",
                args);
}

}  // namespace flashmla::sm90::dense_decode::wide
