// Dense decode over e4m3 codes: up to 16, 32 or 64 packed query rows against one part's share of
// the cache.
//
// The products are transposed: tokens, and then value columns, are the 64 rows of wgmma, and query
// rows are its N. So the cache is the operand that may come from registers: raw rows are loaded
// into a ring, and converted on their way from there into fragments. Four warpgroups:
//
//   scores, side 0 | S^T = K Q^T (t)        | softmax (t) -> P^T | ...
//   scores, side 1 | softmax (t-1) -> P^T   | S^T (t+1)          | ...
//   values 2x      |                        | O^T += V^T P^T, half of the columns each
//
// docs/kernels/dense_fp8.md tells the whole story.
#pragma once

#include "sm90/dense_decode/fp8/scores.cuh"
#include "sm90/dense_decode/fp8/values.cuh"
#include "sm90/host/launch.h"

namespace flashmla::sm90::dense_decode::fp8 {

// With 64 rows what a thread of each role has, of 128 at the launch.
constexpr int kScoreRegisters = 88, kValueRegisters = 168;

// Grid: (row tiles, num_parts): blocks that read the same tokens are neighbours.
template <typename T, typename Format, int kRows>
__global__ void __launch_bounds__(kThreads, 1)
    fp8_decode_kernel(const __grid_constant__ KernelArgs args) {
  extern __shared__ __align__(1024) uint8_t dynamic_shared[];
  using Storage = SharedStorage<Format, kRows>;
  static_assert(sizeof(Storage) <= 232448, "Hopper has 227 KB a block");
  // Addressed by a constant.
  auto& smem = *static_cast<Storage*>(__cvta_shared_to_generic(kSharedBase));
  if (smem_address(dynamic_shared) != kSharedBase) __trap();

  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages<kRows>; ++i) {
      mbarrier_init(smem_address(&smem.full[i]), 1);
      mbarrier_init(smem_address(&smem.empty[i]), kRoleWarps);
    }
    for (int i = 0; i < kPlaces; ++i) smem.places[i].z = 1u << 31;  // of no tile
    for (int i = 0; i < 2; ++i) {
      mbarrier_init(smem_address(&smem.probabilities_full[i]), kWarps);
      mbarrier_init(smem_address(&smem.probabilities_empty[i]), kRoleWarps);
    }
    mbarrier_init(smem_address(&smem.sums_full), kRows);  // the threads that store them
    mbarrier_init(smem_address(&smem.sums_empty), kRoleWarps);
    mbarrier_init_fence();
    smem.row_tile.template find<kRows>(blockIdx.x, 0, args.rows, args.h_q, args.h_q);
  }
  wait_for_prerequisites();
  launch_dependents();
  if (threadIdx.x == 0) {
    smem.begin = load_cut(args.cuts, blockIdx.y, args.b);
    smem.end = load_cut(args.cuts, blockIdx.y + 1, args.b);
  }
  __syncthreads();
  if (threadIdx.x < kRoleThreads) {
    if constexpr (kRows == 64) lower_registers<kScoreRegisters>();
    run_scores<Format, kRows>(args, smem);
  } else {
    if constexpr (kRows == 64) raise_registers<kValueRegisters>();
    run_values<T, Format, kRows>(args, smem);
  }
}

template <typename T, typename Format, int kRows>
Status launch_kernel(const KernelArgs& args, dim3 grid, cudaStream_t stream) {
  const LaunchOptions options{grid, kThreads, sizeof(SharedStorage<Format, kRows>),
                              /*dependent=*/true, /*most_shared=*/true};
  return launch(fp8_decode_kernel<T, Format, kRows>, options, stream, "dense_decode", args);
}

template <typename Format>
Status launch_format(const KernelArgs& args, int tile_rows, dim3 grid, cudaStream_t stream) {
  using T = __nv_bfloat16;
  if (tile_rows <= 16) return launch_kernel<T, Format, 16>(args, grid, stream);
  if (tile_rows <= 32) return launch_kernel<T, Format, 32>(args, grid, stream);
  return launch_kernel<T, Format, 64>(args, grid, stream);
}

}  // namespace flashmla::sm90::dense_decode::fp8
