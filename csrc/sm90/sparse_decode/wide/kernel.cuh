// The wide sparse decode kernel: up to 64 heads of a query token against one part's share of the
// tokens that it attends, from rows of any format.
//
// Four warpgroups: one converts a tile's rows to 16 bit, in one of two buffers in shared memory;
// one computes scores and softmax; two multiply probabilities with the left and the right half of
// the value columns. Tile t's journey:
//
//   plan    | rows of t+3 to L2 ...                                  (by the scores' warpgroup)
//   convert | t            | t+1           | t+2 ...
//   score                  | S = Q K^T (t) | softmax (t) -> P | S (t+1) ...
//   values                                           | O += P V (t), frees its buffer
#pragma once

#include "sm90/attention/work.cuh"
#include "sm90/host/launch.h"
#include "sm90/sparse_decode/wide/convert.cuh"
#include "sm90/sparse_decode/wide/kernels.h"
#include "sm90/sparse_decode/wide/scores.cuh"
#include "sm90/sparse_decode/wide/values.cuh"

namespace flashmla::sm90::sparse::wide {

// Grid: (head tiles, num_parts): blocks that read the same rows are neighbours.
template <typename T, typename Main, typename Extra>
__global__ void __launch_bounds__(kThreads, 1)
    wide_sparse_decode_kernel(const __grid_constant__ KernelArgs args) {
  extern __shared__ __align__(1024) uint8_t dynamic_shared[];
  using Storage = SharedStorage<Main, Extra>;
  static_assert(sizeof(Storage) <= 232448, "Hopper has 227 KB a block");
  // Addressed by a constant.
  auto& smem = *static_cast<Storage*>(__cvta_shared_to_generic(kSharedBase));
  if (smem_address(dynamic_shared) != kSharedBase) __trap();

  if (threadIdx.x == 0) {
    prefetch_tensor_map(&args.query_map);
    for (int i = 0; i < kPlans; ++i) mbarrier_init(smem_address(&smem.planned[i]), kWarps);
    mbarrier_init(smem_address(&smem.query_full), 1);
    for (int i = 0; i < kBuffers; ++i) {
      mbarrier_init(smem_address(&smem.keys_full[i]), kWarps);
      mbarrier_init(smem_address(&smem.keys_empty[i][0]), kValueWarps);
      mbarrier_init(smem_address(&smem.keys_empty[i][1]), kValueWarps);
      mbarrier_init(smem_address(&smem.scores_done[i]), kWarps);
      mbarrier_init(smem_address(&smem.probabilities_stored[i]), kWarps);
      mbarrier_init(smem_address(&smem.values_go[i]), kWarps);
    }
    mbarrier_init_fence();
  }
  wait_for_prerequisites();
  launch_dependents();
  if (threadIdx.x == 0) {
    smem.layer[0] = find_layer(args.common.main);
    smem.layer[1] = args.common.extra.blocks != nullptr ? find_layer(args.common.extra) : nullptr;
    smem.begin = load_cut(args.common.cuts, blockIdx.y, args.common.queries);
    smem.end = load_cut(args.common.cuts, blockIdx.y + 1, args.common.queries);
  }
  __syncthreads();
  const int warpgroup = threadIdx.x / kWarpgroupThreads;
  if (warpgroup == 0) {
    lower_registers<kScoreRegisters>();
    run_scores<T>(args, smem);
  } else if (warpgroup == 3) {
    lower_registers<kConvertRegisters>();
    run_convert<T>(smem);
  } else {
    raise_registers<kValueRegisters>();
    run_values<T>(args, smem);
  }
}

template <typename T, typename Main, typename Extra>
Status launch_kernel(const KernelArgs& args, int num_parts, cudaStream_t stream) {
  const dim3 grid((args.common.h_q + kRows - 1) / kRows, num_parts);
  return launch(wide_sparse_decode_kernel<T, Main, Extra>,
                {grid, kThreads, sizeof(SharedStorage<Main, Extra>), /*dependent=*/true}, stream,
                "sparse_decode", args);
}

// Instantiates the kernel for both types of queries.
#define FLASHMLA_WIDE_SPARSE_DECODE(MAIN, EXTRA)                                                   \
  template Status launch_kernel<__nv_bfloat16, MAIN, EXTRA>(const KernelArgs&, int, cudaStream_t); \
  template Status launch_kernel<__half, MAIN, EXTRA>(const KernelArgs&, int, cudaStream_t)

}  // namespace flashmla::sm90::sparse::wide
