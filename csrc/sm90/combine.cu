// Merges the pieces of the sequences that the schedule cut.
#include "combine.h"

#include <cuda_bf16.h>

#include <algorithm>

#include "combine/merge_row.cuh"
#include "combine/merge_task.cuh"
#include "common/launch.h"

namespace flashmla::sm90 {
namespace {

// That a multiprocessor could hold: so a thread has 80 registers, and one block fits beside the
// narrow kernel's.
constexpr int kLeastFitting = 3;
constexpr int kMostShares = 8;  // of a row
// Shared memory that a block asks for to have a multiprocessor to itself and one other: those that
// finish their part first would get three, and some none.
constexpr size_t kDistance = 100 * 1024;

// Grid: (blocks of a part, num_parts).
template <typename T>
__global__ void __launch_bounds__(kThreads, kLeastFitting)
    combine_kernel(DenseDecodeParams params) {
  const Merge merge = find_merge(params);
  const int rows = params.s_q * params.h_q;
  const Team team(merge.pieces, rows, merge.blocks);
  const int items = merge.pieces > 1 ? rows << team.split : 0;
  // Of a block, which takes neighbouring items: shares of a row have its pieces' weights in common.
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
  const int first = team.block ? 0 : threadIdx.x / 32;
  if (first >= teams) return;
  for (int item = merge.place * teams + first; item < items; item += merge.blocks * teams) {
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

Status run_combine(const DenseDecodeParams& params, bool room_beside, cudaStream_t stream) {
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
  LaunchOptions options{dim3(of_part, params.num_parts), kThreads, room_beside ? 0 : kDistance};
  options.dependent = true;
  if (params.dtype == DType::kBFloat16) {
    return launch(combine_kernel<__nv_bfloat16>, options, stream, "dense_decode combine", params);
  }
  return launch(combine_kernel<__half>, options, stream, "dense_decode combine", params);
}

}  // namespace flashmla::sm90
