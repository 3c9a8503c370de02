#include "make_schedule.h"

#include <cub/block/block_scan.cuh>

#include "../split_schedule.h"
#include "common/launch.h"

namespace flashmla::sm90 {
namespace {

constexpr int kThreads = 1024;

// One block: running costs of the sequences into shared memory, then one cut a thread.
__global__ void __launch_bounds__(kThreads) make_schedule_kernel(MakeScheduleParams params) {
  extern __shared__ int64_t cost_end[];  // [b]
  using Scan = cub::BlockScan<int64_t, kThreads, cub::BLOCK_SCAN_WARP_SCANS>;
  __shared__ typename Scan::TempStorage scan_storage;

  int64_t total = 0;
  for (int first = 0; first < params.b; first += kThreads) {
    const int sequence = first + threadIdx.x;
    const int64_t cost = sequence < params.b ? sequence_cost(params.cache_seqlens[sequence]) : 0;
    int64_t end, sum;
    Scan(scan_storage).InclusiveSum(cost, end, sum);
    if (sequence < params.b) cost_end[sequence] = total + end;
    total += sum;
    __syncthreads();
  }
  for (int part = threadIdx.x; part <= params.num_parts; part += kThreads) {
    const Cut cut = cut_at(part_begin(part, params.num_parts, total), cost_end, params.b);
    reinterpret_cast<int2*>(params.cuts)[part] = {cut.sequence, cut.tile};
  }
}

}  // namespace

Status run_make_schedule(const MakeScheduleParams& params, cudaStream_t stream) {
  if (params.b > kMaxBatch) {
    return Status::InvalidArgument("make_schedule takes at most " + std::to_string(kMaxBatch) +
                                   " sequences, got b = " + std::to_string(params.b));
  }
  return launch(make_schedule_kernel, {1, kThreads, params.b * sizeof(int64_t)}, stream,
                "make_schedule", params);
}

}  // namespace flashmla::sm90
