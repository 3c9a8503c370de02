// Merges the pieces of the sequences that the schedule cut.
#include "sm90/merge/launch.h"

#include <cuda_bf16.h>

#include <algorithm>

#include "sm90/host/launch.h"
#include "sm90/merge/merge_row.cuh"
#include "sm90/merge/merge_task.cuh"

namespace flashmla::sm90 {
namespace merge {
namespace {

// Register budget: 3 blocks per multiprocessor gives 80 registers a thread, so one block fits
// beside a narrow one of dense decode.
constexpr int kBlocksPerMultiprocessor = 3;
constexpr int kMaxShares = 8;  // of a row
// Padding: limits residency to two blocks per multiprocessor; otherwise those that free up first
// take three and others none.
constexpr size_t kPaddingBytes = 100 * 1024;

// Grid: (blocks of a part, num_parts).
template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    merge_kernel(DenseDecodeParams params) {
  const Merge merge = find_merge(params);
  const int rows = params.s_q * params.h_q;
  const Team team(merge.pieces, rows, merge.blocks);
  const int items = merge.pieces > 1 ? rows << team.split : 0;
  // Teams of this block that have work, a power of two. They take neighbouring items: shares of a
  // row have its pieces' weights in common.
  int teams = 1;
  while (!team.block && teams < kWarps && teams * merge.blocks < items) teams *= 2;
  if (items == 0 || merge.block_rank * teams >= items) {
    if (blockIdx.x > 0 || blockIdx.y > 0) return;
    // One block must wait even so: this kernel may not end before what it depends on has. It lets
    // the next kernel in at once, if the others do.
    launch_dependents();
    wait_for_prerequisites();
    return;
  }
  Prerequisites prerequisites;
  const int team_index = team.block ? 0 : threadIdx.x / 32;
  if (team_index >= teams) return;
  for (int item = merge.block_rank * teams + team_index; item < items;
       item += merge.blocks * teams) {
    const int row = item >> team.split, share = item & ((1 << team.split) - 1);
    const RowPieces pieces(params, merge.owner, merge.pieces, row);
    const int64_t target = int64_t{merge.sequence} * rows + row;
    if (merge.pieces == 2)
      merge_row<T, 2>(params, pieces, target, prerequisites);
    else if (merge.pieces <= kFewPieces)
      merge_row<T, kFewPieces>(params, pieces, target, prerequisites);
    else if (team.block)
      merge_by_block<T>(params, pieces, target, share, team.split, prerequisites);
    else
      merge_by_warp<T>(params, pieces, target, share, team.split, prerequisites);
  }
}

}  // namespace
}  // namespace merge

Status run_merge(const DenseDecodeParams& params, bool shares_sm, cudaStream_t stream) {
  using namespace merge;
  if (params.num_parts < 2) return Status::Ok();  // nothing can be cut
  if (params.num_parts > kMaxParts) {
    return Status::InvalidArgument("dense_decode takes schedules of at most " +
                                   std::to_string(kMaxParts) + " parts, got " +
                                   std::to_string(params.num_parts));
  }
  const int rows = params.s_q * params.h_q;
  int multiprocessors = 0;
  if (Status s = count_multiprocessors(&multiprocessors); !s.ok()) return s;
  // One beside each of the other kernel's blocks, there before it is needed; else two, once these
  // end.
  const int all = multiprocessors * (shares_sm ? 1 : 2);
  const int of_part = std::clamp(all / params.num_parts, 1, rows * kMaxShares);
  LaunchOptions options{dim3(of_part, params.num_parts), kThreads, shares_sm ? 0 : kPaddingBytes};
  options.dependent = true;
  if (params.dtype == DType::kBFloat16) {
    return launch(merge_kernel<__nv_bfloat16>, options, stream, "dense_decode merge", params);
  }
  return launch(merge_kernel<__half>, options, stream, "dense_decode merge", params);
}

}  // namespace flashmla::sm90
