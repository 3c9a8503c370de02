// The sparse decode kernel: up to 16 or 32 heads of a query token against one part's share of the
// tokens that it attends.
//
// The products are transposed: tokens, and then value columns, are the 64 rows of wgmma, and heads
// are its N. So the cache's rows are the operand that may come from registers: raw rows are
// gathered into a ring, and converted on their way from there into fragments. Four warpgroups:
//
//   scores   | S^T = K Q^T (t) | softmax (t) -> P^T | S^T (t+1) | softmax (t+1) ...
//   values 3x|                                      | O^T += V^T P^T (t) ...
//   gather   (by the last of the values) | rows of t+2, t+3 ...
#pragma once

#include "sm90/attention/work.cuh"
#include "sm90/host/launch.h"
#include "sm90/sparse_decode/narrow/scores.cuh"
#include "sm90/sparse_decode/narrow/values.cuh"

namespace flashmla::sm90::sparse::narrow {

// Of a thread at the launch.
template <int kRows>
constexpr int kRegisters = kRows == 16 ? 96 : 128;

// Grid: (head tiles, num_parts): blocks that read the same rows are neighbours.
template <typename T, typename Format, int kRows>
__device__ __forceinline__ void decode(const KernelArgs& args) {
  extern __shared__ __align__(1024) uint8_t dynamic_shared[];
  using Storage = SharedStorage<Format, kRows>;
  static_assert(sizeof(Storage) <= 232448, "Hopper has 227 KB a block");
  // Addressed by a constant.
  auto& smem = *static_cast<Storage*>(__cvta_shared_to_generic(kSharedBase));
  if (smem_address(dynamic_shared) != kSharedBase) __trap();

  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages * kTileSlots; ++i) {
      mbarrier_init(smem_address(&smem.full[0][i]), 1);
      mbarrier_init(smem_address(&smem.empty[0][i]), kValueWarps);
    }
    for (int i = 0; i < 2; ++i) {
      mbarrier_init(smem_address(&smem.probabilities_full[i]), kWarps);
      mbarrier_init(smem_address(&smem.probabilities_empty[i]), kValueWarps);
    }
    mbarrier_init(smem_address(&smem.sums_full), 4);  // the threads that store them
    mbarrier_init(smem_address(&smem.sums_empty), kValueWarps);
    mbarrier_init_fence();
  }
  wait_for_prerequisites();
  launch_dependents();
  if (threadIdx.x == 0) {
    smem.layer = find_layer(args.main);
    smem.begin = load_cut(args.cuts, blockIdx.y, args.queries);
    smem.end = load_cut(args.cuts, blockIdx.y + 1, args.queries);
  }
  __syncthreads();
  const int warpgroup = threadIdx.x / kWarpgroupThreads;
  switch (warpgroup) {
    case 0:
      run_scores<Format, kRows>(args, smem);
      break;
    case 1:
    case 2:
      run_values<T, Format, kRows, kWideValues, false>(args, smem);
      break;
    default:
      run_values<T, Format, kRows, kNarrowValues, true>(args, smem);
  }
}

template <typename T, typename Format, int kRows>
__global__ void __launch_bounds__(kThreads, 1) sparse_decode_kernel(const KernelArgs args) {
  decode<T, Format, kRows>(args);
}

template <typename T, typename Format>
__global__ void __maxnreg__(kRegisters<16>) sparse_decode_small_kernel(const KernelArgs args) {
  decode<T, Format, 16>(args);
}

template <typename T, typename Format, int kRows>
Status launch_kernel(const KernelArgs& args, int num_parts, cudaStream_t stream) {
  const dim3 grid((args.h_q + kRows - 1) / kRows, num_parts);
  const LaunchOptions options{grid, kThreads, sizeof(SharedStorage<Format, kRows>),
                              /*dependent=*/true, /*most_shared=*/true};
  if constexpr (kRows == 16) {
    return launch(sparse_decode_small_kernel<T, Format>, options, stream, "sparse_decode", args);
  } else {
    return launch(sparse_decode_kernel<T, Format, kRows>, options, stream, "sparse_decode", args);
  }
}

}  // namespace flashmla::sm90::sparse::narrow
