// The narrow kernel: at most 16 or 32 packed query rows against one part's share of the cache.
//
// The products are the wide kernel's transposed: tokens, and then value columns, are the 64 rows of
// wgmma, and the query rows are its N. So few rows leave no tensor core idle, a thread keeps little
// of the output, and with 16 rows a block leaves room for one of the merge's, which is then on the
// multiprocessor when it is needed.
//
// Three warpgroups as in the wide kernel, and a warp that loads:
//
//   score  | S^T = K Q^T (t) | softmax (t) -> P^T | S^T (t+1) | softmax (t+1) ...
//   values |                                      | O^T += V^T P^T (t), refill slot of t
//
// docs/kernels/dense_decode.md tells the whole story.
#pragma once

#include "sm90/dense_decode/narrow/load.cuh"
#include "sm90/dense_decode/narrow/score.cuh"
#include "sm90/dense_decode/narrow/values.cuh"
#include "sm90/host/launch.h"

namespace flashmla::sm90::dense_decode::narrow {

// Registers per thread; 88 leaves room for a merge block beside this one (test_sass.py).
template <int kRows>
constexpr int kRegisters = kRows == kLeastRows ? 88 : 128;

// Grid: (row tiles, h_kv, num_parts): blocks that read the same tokens are neighbours.
// kGiven: what query tokens see is read, not told by causal.
template <typename T, int kRows, int kBoxes, bool kGiven>
__global__ void __maxnreg__(kRegisters<kRows>)
    narrow_decode_kernel(const __grid_constant__ KernelArgs args) {
  extern __shared__ __align__(1024) uint8_t dynamic_shared[];
  // Addressed by a constant, as in the wide kernel.
  auto& smem = *static_cast<SharedStorage<kRows>*>(__cvta_shared_to_generic(kSharedBase));
  if (smem_address(dynamic_shared) != kSharedBase) __trap();

  if (threadIdx.x == kLoadingThread) {
    prefetch_tensor_map(&args.query_half_map);
    prefetch_tensor_map(&args.cache_half_map);
    prefetch_tensor_map(&args.query_rope_map);
    prefetch_tensor_map(&args.cache_rope_map);
  }
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      mbarrier_init(smem_address(&smem.half_full[0][i]), 1);
      mbarrier_init(smem_address(&smem.half_full[1][i]), 1);
      mbarrier_init(smem_address(&smem.rope_full[i]), 1);
      mbarrier_init(smem_address(&smem.probabilities_stored[i]), kWarpgroupWarps);
      mbarrier_init(smem_address(&smem.load_done[i]), 2 * kWarpgroupWarps);
    }
    mbarrier_init(smem_address(&smem.sums_full), 4);  // the threads that store them
    mbarrier_init(smem_address(&smem.sums_empty), 2 * kWarpgroupWarps);
    mbarrier_init_fence();
    smem.row_tile.template find<kRows>(blockIdx.x, blockIdx.y, args.rows, args.h_q,
                                       args.heads_per_kv);
  }
  __syncthreads();  // the barriers are initialised, the row tile is found
  wait_for_prerequisites();
  launch_dependents();
  const Cut begin = load_cut(args.cuts, blockIdx.z, args.b),
            end = load_cut(args.cuts, blockIdx.z + 1, args.b);
  const int warpgroup = threadIdx.x / kWarpgroupThreads;
  if (warpgroup == 0) {
    run_scores<T, kGiven>(args, smem, begin, end);
  } else if (warpgroup < 3) {
    run_values<T>(args, smem, begin, end, warpgroup - 1);
  } else if (threadIdx.x == kLoadingThread) {
    run_loads<kRows, kBoxes>(args, smem, begin, end);
  }
}

// With most_shared the merge's blocks find room beside 16 rows; beside 32 the registers have none.
template <typename T, int kRows, int kBoxes, bool kGiven>
Status launch_kernel(const KernelArgs& args, dim3 grid, cudaStream_t stream) {
  return launch(narrow_decode_kernel<T, kRows, kBoxes, kGiven>,
                {grid, kThreads, sizeof(SharedStorage<kRows>), /*dependent=*/true,
                 /*most_shared=*/true},
                stream, "dense_decode", args);
}

}  // namespace flashmla::sm90::dense_decode::narrow
