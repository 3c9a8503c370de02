// The wide sparse decode kernel: up to 64 heads of a query token against one part's share of the
// tokens that it attends, from rows of any format.
//
// Four warpgroups: one brings a tile's rows and converts them to 16 bit, in a buffer in shared
// memory; one computes scores and softmax; two multiply probabilities with the left and the right
// half of the value columns. Tile t's journey:
//
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
template <typename T, typename Main, typename Extra, Feed kFeed>
__global__ void __launch_bounds__(kThreads, 1)
    wide_sparse_decode_kernel(const __grid_constant__ KernelArgs args) {
  extern __shared__ __align__(1024) uint8_t dynamic_shared[];
  using Storage = SharedStorage<Main, Extra, kFeed>;
  constexpr int kBlocks = Storage::kBlocks;
  static_assert(sizeof(Storage) <= kSharedBytes, "Hopper has 227 KB a block");
  // Addressed by a constant, but for a cluster's blocks, whose addresses tell them apart.
  auto& smem = *(kBlocks == 1 ? static_cast<Storage*>(__cvta_shared_to_generic(kSharedBase))
                              : reinterpret_cast<Storage*>(dynamic_shared));
  if (kBlocks == 1 && smem_address(dynamic_shared) != kSharedBase) __trap();

  if (threadIdx.x == 0) {
    prefetch_tensor_map(&args.query_map);
    mbarrier_init(smem_address(&smem.query_full), 1);
    for (int i = 0; i < Storage::kBuffers; ++i) {
      const int arrivals = kFeed == Feed::kCopy ? kWarpgroupThreads : kWarps;
      for (auto& full : smem.keys_full[i]) mbarrier_init(smem_address(&full), arrivals);
      for (auto& empty : smem.keys_empty[i]) {
        mbarrier_init(smem_address(&empty), kBlocks * kValueWarps);
      }
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
  if constexpr (kBlocks == 2)
    cluster_sync();
  else
    __syncthreads();
  const int warpgroup = threadIdx.x / kWarpgroupThreads;
  switch (warpgroup) {
    case 0:
      lower_registers<score_registers(Storage::kRing)>();
      run_scores<T>(args, smem);
      break;
    case 1:
    case 2:
      raise_registers<kValueRegisters>();
      run_values<T>(args, smem);
      break;
    default:
      lower_registers<convert_registers(Storage::kRing)>();
      run_convert<T>(args.common, smem);
  }
  if constexpr (kBlocks == 2) cluster_sync();  // the peer may still store and arrive here
}

template <typename T, typename Main, typename Extra>
Status launch_kernel(const KernelArgs& args, int num_parts, bool pairs, cudaStream_t stream) {
  const dim3 grid((args.common.h_q + kRows - 1) / kRows, num_parts);
  const auto start = [&](auto kernel, size_t shared_bytes, int cluster) {
    return launch(
        kernel, {grid, kThreads, shared_bytes, /*dependent=*/true, /*most_shared=*/false, cluster},
        stream, "sparse_decode", args);
  };
  if constexpr (Main::kCodes == Codes::kNone) {
    return start(wide_sparse_decode_kernel<T, Main, Extra, Feed::kCopy>,
                 sizeof(SharedStorage<Main, Extra, Feed::kCopy>), 1);
  } else if (pairs) {
    return start(wide_sparse_decode_kernel<T, Main, Extra, Feed::kPeers>,
                 sizeof(SharedStorage<Main, Extra, Feed::kPeers>), 2);
  } else {
    return start(wide_sparse_decode_kernel<T, Main, Extra, Feed::kRing>,
                 sizeof(SharedStorage<Main, Extra, Feed::kRing>), 1);
  }
}

// Instantiates the kernel for both types of queries.
#define FLASHMLA_WIDE_SPARSE_DECODE(MAIN, EXTRA)                                          \
  template Status launch_kernel<__nv_bfloat16, MAIN, EXTRA>(const KernelArgs&, int, bool, \
                                                            cudaStream_t);                \
  template Status launch_kernel<__half, MAIN, EXTRA>(const KernelArgs&, int, bool, cudaStream_t)

}  // namespace flashmla::sm90::sparse::wide
