// Merges the pieces of the sequences that the schedule cut.
#include "sm90/merge/launch.h"

#include <cuda_bf16.h>

#include <algorithm>
#include <string>

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
template <typename T, int kColumns, bool kSink>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    merge_kernel(MergeParams params) {
  const Merge merge = find_merge(params);
  const Team team(merge.pieces, params.rows, merge.blocks);
  const int items = merge.pieces > 1 ? params.rows << team.split : 0;
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
    const RowPieces<kColumns> pieces(params, merge.owner, merge.pieces, row);
    const ResultRow<T, kColumns, kSink> result(params, merge.sequence, row);
    if (merge.pieces == 2)
      merge_row<2>(pieces, result, prerequisites);
    else if (merge.pieces <= kFewPieces)
      merge_row<kFewPieces>(pieces, result, prerequisites);
    else if (team.block)
      merge_by_block(pieces, result, share, team.split, prerequisites);
    else
      merge_by_warp(pieces, result, share, team.split, prerequisites);
  }
}

template <typename T, int kColumns>
Status launch_merge(const MergeParams& params, const LaunchOptions& options, cudaStream_t stream) {
  const auto kernel = params.attn_sink == nullptr ? merge_kernel<T, kColumns, false>
                                                  : merge_kernel<T, kColumns, true>;
  return launch(kernel, options, stream, "merge", params);
}

}  // namespace
}  // namespace merge

Status run_merge(const MergeParams& params, bool shares_sm, cudaStream_t stream) {
  using namespace merge;
  if (params.num_parts < 2 || params.rows == 0) return Status::Ok();  // nothing can be cut
  if (params.num_parts > kMaxParts) {
    return Status::InvalidArgument("the Hopper merge takes schedules of at most " +
                                   std::to_string(kMaxParts) + " parts, got " +
                                   std::to_string(params.num_parts));
  }
  if (params.d_v != 512 || params.dtype == DType::kFloat32) {
    return Status::InvalidArgument("the Hopper merge takes d_v = 512 and results of bf16 or f16");
  }
  int multiprocessors = 0;
  if (Status s = count_multiprocessors(&multiprocessors); !s.ok()) return s;
  // One beside each of the other kernel's blocks, there before it is needed; else two, once these
  // end.
  const int all = multiprocessors * (shares_sm ? 1 : 2);
  const int of_part = std::clamp(all / params.num_parts, 1, params.rows * kMaxShares);
  LaunchOptions options{dim3(of_part, params.num_parts), kThreads, shares_sm ? 0 : kPaddingBytes};
  options.dependent = true;
  return params.dtype == DType::kBFloat16
             ? launch_merge<__nv_bfloat16, 512>(params, options, stream)
             : launch_merge<__half, 512>(params, options, stream);
}

}  // namespace flashmla::sm90
