#include "sm90/make_schedule/launch.h"

#include <cub/block/block_reduce.cuh>
#include <cub/block/block_scan.cuh>
#include <cuda/functional>

#include "schedule/plan.h"
#include "sm90/host/launch.h"

namespace flashmla::sm90 {
namespace make_schedule {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;

// The least stride that cuts the sequences into at most num_parts pieces, for b <= num_parts. All
// warps try strides at once, and the range shrinks by their number each round.
__device__ int64_t find_uniform_stride(const MakeScheduleParams& params, int64_t total_tiles,
                                       int64_t most_tiles) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int64_t high = max(most_tiles, int64_t{1});
  int64_t low = max(ceil_div(total_tiles, params.num_parts), int64_t{1});
  while (low < high) {
    const int64_t step = ceil_div(high - low, kWarps + 1);
    const int64_t stride = min(low + step * (warp + 1), high) - 1;  // in [low, high)
    int64_t pieces = 0;
    for (int i = lane; i < params.b; i += 32) {
      pieces += num_pieces(num_tiles(params.cache_seqlens[i]), stride);
    }
#pragma unroll
    for (int i = 16; i > 0; i /= 2) pieces += __shfl_xor_sync(~0u, pieces, i);
    // More pieces with a smaller stride: the warps whose strides are too small come first.
    const int too_small = __syncthreads_count(pieces > params.num_parts) / 32;
    const int64_t next_low = too_small > 0 ? min(low + step * too_small, high) : low;
    high = too_small < kWarps ? min(low + step * (too_small + 1), high) - 1 : high;
    low = next_low;
  }
  return low;
}

// One block: a plan, the running units of the sequences in shared memory, then one cut a thread.
__global__ void __launch_bounds__(kThreads) make_schedule_kernel(MakeScheduleParams params) {
  extern __shared__ int64_t unit_end[];  // [b]
  using Reduce = cub::BlockReduce<int64_t, kThreads>;
  using Scan = cub::BlockScan<int64_t, kThreads, cub::BLOCK_SCAN_WARP_SCANS>;
  __shared__ union {
    typename Reduce::TempStorage reduce;
    typename Scan::TempStorage scan;
  } temp;
  __shared__ int64_t sums[2];

  int64_t tiles = 0, most = 0;
  for (int i = threadIdx.x; i < params.b; i += kThreads) {
    const int64_t t = num_tiles(params.cache_seqlens[i]);
    tiles += t;
    most = max(most, t);
  }
  tiles = Reduce(temp.reduce).Sum(tiles);
  __syncthreads();
  most = Reduce(temp.reduce).Reduce(most, cuda::maximum<>{});
  if (threadIdx.x == 0) {
    sums[0] = tiles;
    sums[1] = most;
  }
  __syncthreads();
  const bool few = params.b <= params.num_parts;
  const int64_t uniform_stride = few ? find_uniform_stride(params, sums[0], sums[1]) : 0;
  SplitPlan plan = choose_plan(params.b, params.num_parts, sums[0], uniform_stride);

  int64_t total = 0;
  for (int first = 0; first < params.b; first += kThreads) {
    const int i = first + threadIdx.x;
    const int64_t units =
        i < params.b ? sequence_units(plan, num_tiles(params.cache_seqlens[i])) : 0;
    int64_t end, sum;
    Scan(temp.scan).InclusiveSum(units, end, sum);
    if (i < params.b) unit_end[i] = total + end;
    total += sum;
    __syncthreads();
  }
  if (plan.kind == SplitPlan::kPacked) {
    const int part = threadIdx.x;  // num_parts <= kMaxParts
    const int64_t units =
        part < params.num_parts ? whole_part_units(part, params.num_parts, unit_end, params.b) : 0;
    const int64_t largest = Reduce(temp.reduce).Reduce(units, cuda::maximum<>{});
    if (threadIdx.x == 0) sums[1] = largest;
    __syncthreads();
    plan = choose_whole(plan, sums[1]);
  }
  for (int part = threadIdx.x; part <= params.num_parts; part += kThreads) {
    // The last cut is the end also where rounding left room behind it.
    const Cut cut = part < params.num_parts
                        ? cut_at(plan, part, params.num_parts, unit_end, params.b)
                        : Cut{params.b, 0};
    reinterpret_cast<int2*>(params.cuts)[part] = {cut.sequence, cut.tile};
  }
}

}  // namespace
}  // namespace make_schedule

Status run_make_schedule(const MakeScheduleParams& params, cudaStream_t stream) {
  using namespace make_schedule;
  if (params.b > kMaxBatch) {
    return Status::InvalidArgument("make_schedule takes at most " + std::to_string(kMaxBatch) +
                                   " sequences, got b = " + std::to_string(params.b));
  }
  return launch(make_schedule_kernel, {1, kThreads, params.b * sizeof(int64_t)}, stream,
                "make_schedule", params);
}

}  // namespace flashmla::sm90
