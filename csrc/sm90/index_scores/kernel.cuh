// The index_scores kernel: a persistent block streams keys through a ring and scores them for up to
// kQueries query tokens at once.
//
//   loads     | queries, tiles 0 1 2 3 ... 7 | tile 8 once 0 is multiplied | 9 | 10 ...
//   scores 0              | K Q^T (0) | relu, weigh, sum, store | K Q^T (2) | ...
//   scores 1                          | K Q^T (1) | relu, weigh, sum, store | K Q^T (3) ...
//
// docs/kernels/indexer.md tells the whole story.
#pragma once

#include "sm90/host/launch.h"
#include "sm90/index_scores/fill.cuh"
#include "sm90/index_scores/load.cuh"
#include "sm90/index_scores/score.cuh"

namespace flashmla::sm90::index_scores {

template <bool kFp8, int kHeads, int kQueries>
__global__ void __launch_bounds__(Plan<kFp8, kHeads * kQueries>::kThreads,
                                  Plan<kFp8, kHeads * kQueries>::kBlocks)
    index_scores_kernel(const __grid_constant__ KernelArgs args) {
  extern __shared__ __align__(1024) uint8_t dynamic_shared[];
  using Storage = SharedStorage<kFp8, kHeads, kQueries>;
  using Plan = typename Storage::Plan;
  static_assert(sizeof(Storage) <= 232448, "Hopper has 227 KB a block");
  auto& smem = *reinterpret_cast<Storage*>(dynamic_shared);
  if (smem_address(dynamic_shared) % 1024 != 0) __trap();

  if (threadIdx.x == 0) {
    prefetch_tensor_map(&args.key_map);
    prefetch_tensor_map(&args.query_map);
    for (int i = 0; i < Storage::kStages; ++i) {
      mbarrier_init(smem_address(&smem.keys_full[i]), 1);
      mbarrier_init(smem_address(&smem.keys_empty[i]), kWarps);
    }
    for (int i = 0; i < 2; ++i) {
      mbarrier_init(smem_address(&smem.queries_full[i]), 1);
      mbarrier_init(smem_address(&smem.queries_empty[i]), Plan::kScoringWarps);
    }
    mbarrier_init_fence();
  }
  __syncthreads();
  wait_for_prerequisites();
  launch_dependents();
  const int warpgroup = threadIdx.x / kWarpgroupThreads;
  if (warpgroup == Plan::kWarpgroups) {
    if constexpr (Plan::kMovesRegisters) lower_registers<kLoadingRegisters>();
    const int warp = threadIdx.x / 32 - Plan::kScoringWarps;
    if (warp < Plan::kLoadingWarps) run_loads<Storage, kHeads, kQueries>(args, smem, warp);
  } else {
    if constexpr (Plan::kMovesRegisters) raise_registers<kScoringRegisters>();
    if (args.fill) fill_unseen<kQueries, Plan::kScoringWarps>(args);
    run_scores(args, smem, warpgroup);
  }
}

template <bool kFp8, int kHeads, int kQueries>
Status launch_kernel(const KernelArgs& args, dim3 grid, cudaStream_t stream) {
  using Storage = SharedStorage<kFp8, kHeads, kQueries>;
  if (args.chunk_tiles == 0) grid.z = Storage::Plan::kBlocks;
  return launch(index_scores_kernel<kFp8, kHeads, kQueries>,
                {grid, Storage::Plan::kThreads, sizeof(Storage),
                 /*dependent=*/true,
                 /*most_shared=*/true},
                stream, "index_scores", args);
}

}  // namespace flashmla::sm90::index_scores
