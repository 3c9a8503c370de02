// Merges the pieces of the sequences that the schedule cut.
#include "sm90/merge/launch.h"

#include <cuda_bf16.h>

#include <algorithm>

#include "sm90/host/launch.h"
#include "sm90/merge/merge_row.cuh"
#include "sm90/merge/merge_task.cuh"

namespace flashmla::sm90 {
namespace {

// That the registers of a multiprocessor must do for: so a thread has 80, and one block fits beside
// the narrow kernel's.
constexpr int kBlocksPerMultiprocessor = 3;
constexpr int kMostShares = 8;  // of a row
// Shared memory that a block asks for, and does not use, so that no more than two share a
// multiprocessor: else those that are free first take three, and some get none.
constexpr size_t kUnusedShared = 100 * 1024;

// Grid: (blocks of a part, num_parts).
template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    merge_kernel(DenseDecodeParams params) {
  const Merge merge = find_merge(params);
  const int rows = params.s_q * params.h_q;
  const Team team(merge.pieces, rows, merge.blocks);
  const int items = merge.pieces > 1 ? rows << team.split : 0;
  // Of a block that have something to do. They take neighbouring items: shares of a row have its
  // pieces' weights in common.
  int teams = 1;
  while (!team.block && teams < kWarps && teams * merge.blocks < items) teams *= 2;
  if (items == 0 || merge.place * teams >= items) {
    if (blockIdx.x > 0 || blockIdx.y > 0) return;
    // One block must wait even so: this kernel may not end before what it depends on has. It lets
    // the next kernel in at once, if the others do.
    launch_dependents();
    wait_for_prerequisites();
    return;
  }
  Prerequisites prerequisites;
  const int number = team.block ? 0 : threadIdx.x / 32;  // of the thread's team
  if (number >= teams) return;
  for (int item = merge.place * teams + number; item < items; item += merge.blocks * teams) {
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

Status run_merge(const DenseDecodeParams& params, bool room_beside, cudaStream_t stream) {
  if (params.num_parts < 2) return Status::Ok();  // nothing can be cut
  if (params.num_parts > kMaxParts) {
    return Status::InvalidArgument("dense_decode takes schedules of at most " +
                                   std::to_string(kMaxParts) + " parts, got " +
                                   std::to_string(params.num_parts));
  }
  const int rows = params.s_q * params.h_q;
  int multiprocessors = 0;
  if (Status s = count_multiprocessors(&multiprocessors); !s.ok()) return s;
  // Beside the other kernel's blocks one each, there before it is needed. Else two, once these end.
  const int all = multiprocessors * (room_beside ? 1 : 2);
  const int of_part = std::clamp(all / params.num_parts, 1, rows * kMostShares);
  LaunchOptions options{dim3(of_part, params.num_parts), kThreads, room_beside ? 0 : kUnusedShared};
  options.dependent = true;
  if (params.dtype == DType::kBFloat16) {
    return launch(merge_kernel<__nv_bfloat16>, options, stream, "dense_decode merge", params);
  }
  return launch(merge_kernel<__half>, options, stream, "dense_decode merge", params);
}

}  // namespace flashmla::sm90
