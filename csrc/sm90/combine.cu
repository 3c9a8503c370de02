// Merges the pieces of the sequences that the schedule cut.
#include "combine.h"

#include <cuda_bf16.h>

#include <algorithm>

#include "combine/merge_list.cuh"
#include "combine/merge_row.cuh"
#include "common/launch.h"

namespace flashmla::sm90 {
namespace {

constexpr int kBlocksPerMultiprocessor = 3;  // what fits
constexpr int kMostShares = 8;               // of a row

template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    combine_kernel(DenseDecodeParams params) {
  __shared__ SharedList list;
  const int rows = params.s_q * params.h_q;
  const Merges all = list_merges(params, list);
  if (all.tasks == 0) launch_dependents();  // lets the next kernel in at once
  // One block must wait even so: this kernel may not end before what it depends on has.
  if (blockIdx.x >= max(all.tasks, 1)) return;
  if (all.tasks == 0) wait_for_prerequisites();
  Prerequisites prerequisites;
  int turn = 0;
  for (int task = blockIdx.x; task < all.tasks; task += gridDim.x, turn ^= 1) {
    if (all.mine.first_task <= task && task < all.mine_end) list.current[turn] = all.mine;
    __syncthreads();
    const Merge merge = list.current[turn];
    const Team team(merge.pieces, all.rows);
    const int local = task - merge.first_task;
    const int item = team.block ? local : local * kWarps + threadIdx.x / 32;
    const int row = item >> team.split, share = item & ((1 << team.split) - 1);
    if (row >= rows) continue;
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

Status run_combine(const DenseDecodeParams& params, cudaStream_t stream) {
  if (params.num_parts < 2) return Status::Ok();  // nothing can be cut
  if (params.num_parts > kMaxParts) {
    return Status::InvalidArgument("dense_decode takes schedules of at most " +
                                   std::to_string(kMaxParts) + " parts, got " +
                                   std::to_string(params.num_parts));
  }
  const int rows = params.s_q * params.h_q;
  int multiprocessors = 0;
  if (Status s = count_multiprocessors(&multiprocessors); !s.ok()) return s;
  const unsigned grid = std::min((params.num_parts - 1) * rows * kMostShares,
                                 multiprocessors * kBlocksPerMultiprocessor);
  LaunchOptions options{grid, kThreads};
  options.dependent = true;
  if (params.dtype == DType::kBFloat16) {
    return launch(combine_kernel<__nv_bfloat16>, options, stream, "dense_decode combine", params);
  }
  return launch(combine_kernel<__half>, options, stream, "dense_decode combine", params);
}

}  // namespace flashmla::sm90
