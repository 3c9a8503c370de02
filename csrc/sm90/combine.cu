// Merges the pieces of the sequences that the schedule cut: out = sum of w_i out_i with
// w_i = 2^(lse_i - lse), in a fixed order.
#include "combine.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cub/block/block_scan.cuh>

#include "../split_schedule.h"
#include "common/barrier.cuh"
#include "common/launch.h"
#include "common/matrix.cuh"

namespace flashmla::sm90 {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kValueDim = 512;
constexpr float kLn2 = 0.6931471805599453f;
constexpr int kBlocksPerMultiprocessor = 3;  // what fits
constexpr int kQuarters = 4;                 // of a row's columns
static_assert(kThreads == kMaxParts, "a thread looks after one part");
// Who merges what: a warp a whole row, a warp a quarter row, or a block a quarter row. The more
// pieces, the fewer columns and the more warps, so that a lane has few rounds of loads to wait for;
// but blocks must not come in rounds themselves, unless a warp could not hold the pieces' weights.
enum class Team { kWarpRow, kWarpQuarter, kBlockQuarter };

__device__ __forceinline__ Team choose_team(int pieces, bool one_round) {
  if (pieces <= 4) return Team::kWarpRow;
  if (pieces > 32 || (pieces > 8 && one_round)) return Team::kBlockQuarter;
  return Team::kWarpQuarter;
}

// The merges to do. A part owns the merge of a sequence that starts in it and goes on in the next.
struct MergeList {
  Cut cuts[kMaxParts + 1];
  // Bit p: part p goes on with the sequence that part p - 1 went on with.
  uint32_t continues[kMaxParts / 32 + 1];
  bool one_round;           // the grid has a block for each quarter row of all merges
  int task_end[kMaxParts];  // running number of block tasks, by the part after the owner
};

// How many bits from `first` on are set without a gap.
__device__ __forceinline__ int run_length(const uint32_t* bits, int first) {
  int length = 0;
  for (int word = first / 32, shift = first % 32;; ++word, shift = 0) {
    const uint32_t clear = ~bits[word] >> shift << shift;
    if (clear != 0) return length + __ffs(clear) - 1 - shift;
    length += 32 - shift;
  }
}

// Fills the list; returns the number of tasks. Every thread calls.
__device__ __forceinline__ int list_merges(const DenseDecodeParams& params, MergeList& list) {
  const int thread = threadIdx.x, rows = params.s_q * params.h_q;
  for (int i = thread; i <= params.num_parts; i += kThreads) {
    const int2 cut = reinterpret_cast<const int2*>(params.cuts)[i];
    list.cuts[i] = {cut.x, cut.x >= 0 && cut.x < params.b ? max(cut.y, 0) : 0};
  }
  if (thread == 0) list.continues[kMaxParts / 32] = 0;
  __syncthreads();
  // Part p enters a sequence midway; and, of those, goes on with what the previous part also
  // entered midway.
  const bool midway = thread > 0 && thread < params.num_parts && list.cuts[thread].tile > 0;
  const bool goes_on = midway && list.cuts[thread - 1].tile > 0 &&
                       list.cuts[thread - 1].sequence == list.cuts[thread].sequence;
  const uint32_t word = __ballot_sync(~0u, goes_on);
  if (thread % 32 == 0) list.continues[thread / 32] = word;
  __syncthreads();

  const int merges = __syncthreads_count(midway && !goes_on);
  const bool one_round = merges * rows * kQuarters <= static_cast<int>(gridDim.x);
  if (thread == 0) list.one_round = one_round;

  int tasks = 0;  // of the merge owned by the part before this thread's
  if (midway && !goes_on) {
    const Team team = choose_team(2 + run_length(list.continues, thread + 1), one_round);
    const int items = team == Team::kWarpRow ? rows : rows * kQuarters;
    tasks = team == Team::kBlockQuarter ? items : (items + kWarps - 1) / kWarps;
  }
  using Scan = cub::BlockScan<int, kThreads, cub::BLOCK_SCAN_WARP_SCANS>;
  __shared__ typename Scan::TempStorage scan_storage;
  int total;
  Scan(scan_storage).InclusiveSum(tasks, tasks, total);
  list.task_end[thread] = tasks;
  return total;
}

__device__ __forceinline__ int slot_of(int owner, int piece) {
  return piece_slot(owner + piece, /*continued=*/piece > 0);
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int i = 16; i > 0; i /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, i));
  return x;
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int i = 16; i > 0; i /= 2) x += __shfl_xor_sync(~0u, x, i);
  return x;
}

// Log-sum-exp (base 2) of what the lanes hold; each lane gets it.
__device__ __forceinline__ float warp_lse(float lse) {
  const float peak = warp_max(lse);
  if (peak == -INFINITY) return -INFINITY;
  return peak + log2f(warp_sum(exp2f(lse - peak)));
}

// Weight of a piece; 0 also where no piece saw a key.
__device__ __forceinline__ float weight(float piece_lse, float total_lse) {
  return total_lse == -INFINITY ? 0.0f : exp2f(piece_lse - total_lse);
}

__device__ __forceinline__ void add_scaled(float4& sum, float w, float4 v) {
  sum.x += w * v.x;
  sum.y += w * v.y;
  sum.z += w * v.z;
  sum.w += w * v.w;
}

// Stores columns that the kernel left as float4 number `i` of a row: in each 16 columns, the lane t
// of a quad holds 2t, 2t + 1, 2t + 8, 2t + 9.
template <typename T>
__device__ __forceinline__ void store_columns(T* row, int i, float4 v) {
  auto* pairs = reinterpret_cast<uint32_t*>(row) + i / 4 * 8 + i % 4;
  pairs[0] = pack<T>(v.x, v.y);
  pairs[4] = pack<T>(v.z, v.w);
}

// One warp merges kCount quarters of a row, from `quarter` on, of at most 32 pieces.
template <typename T, int kCount>
__device__ __forceinline__ void merge_by_warp(const DenseDecodeParams& params, int owner,
                                              int pieces, int sequence, int row, int quarter) {
  constexpr int kPiecesAtOnce = 8 / kCount;
  const int lane = threadIdx.x % 32, rows = params.s_q * params.h_q;
  const float lse =
      lane < pieces ? params.lse_accum[int64_t{slot_of(owner, lane)} * rows + row] : -INFINITY;
  float total_lse = -INFINITY, lane_weight = 0;
  float4 sum[kCount] = {};
  for (int first = 0; first < pieces; first += kPiecesAtOnce) {
    float4 v[kPiecesAtOnce][kCount] = {};
#pragma unroll
    for (int i = 0; i < kPiecesAtOnce; ++i) {
      if (first + i >= pieces) break;
      const int64_t index = int64_t{slot_of(owner, first + i)} * rows + row;
      const auto* source = reinterpret_cast<const float4*>(params.out_accum + index * kValueDim);
#pragma unroll
      for (int j = 0; j < kCount; ++j) v[i][j] = source[(quarter + j) * 32 + lane];
    }
    if (first == 0) {  // only now, so that the first loads all wait for memory together
      total_lse = warp_lse(lse);
      lane_weight = weight(lse, total_lse);
    }
#pragma unroll
    for (int i = 0; i < kPiecesAtOnce; ++i) {
      const float w = __shfl_sync(~0u, lane_weight, (first + i) % 32);  // 0 past the last piece
#pragma unroll
      for (int j = 0; j < kCount; ++j) add_scaled(sum[j], w, v[i][j]);
    }
  }
  const int64_t target = int64_t{sequence} * rows + row;
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    store_columns(static_cast<T*>(params.out) + target * kValueDim, (quarter + j) * 32 + lane,
                  sum[j]);
  }
  if (quarter == 0 && lane == 0) params.lse[target] = total_lse * kLn2;
}

// One block merges a quarter row of any number of pieces, its warps taking turns at them.
template <typename T>
__device__ __forceinline__ void merge_by_block(const DenseDecodeParams& params, int owner,
                                               int pieces, int sequence, int row, int quarter) {
  __shared__ float4 partial[kWarps][32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, rows = params.s_q * params.h_q;
  const int column = quarter * 32 + lane;  // in float4
  const float* lse = params.lse_accum + row;
  float lane_lse = -INFINITY;
  for (int i = lane; i < pieces; i += 32) {
    const float next = lse[int64_t{slot_of(owner, i)} * rows];
    const float peak = fmaxf(lane_lse, next);
    if (peak > -INFINITY) lane_lse = peak + log2f(exp2f(lane_lse - peak) + exp2f(next - peak));
  }
  constexpr int kPiecesAtOnce = 8;
  float total_lse = -INFINITY;
  float4 sum = {};
  for (int first = warp; first < pieces; first += kWarps * kPiecesAtOnce) {
    float4 v[kPiecesAtOnce] = {};
    float piece_lse[kPiecesAtOnce];
#pragma unroll
    for (int i = 0; i < kPiecesAtOnce; ++i) {
      const int piece = first + i * kWarps;
      piece_lse[i] = -INFINITY;
      if (piece >= pieces) continue;
      const int64_t index = int64_t{slot_of(owner, piece)} * rows;
      piece_lse[i] = lse[index];
      v[i] = reinterpret_cast<const float4*>(params.out_accum + (index + row) * kValueDim)[column];
    }
    // Only now, so that the first loads all wait for memory together.
    if (first == warp) total_lse = warp_lse(lane_lse);
#pragma unroll
    for (int i = 0; i < kPiecesAtOnce; ++i) {
      add_scaled(sum, weight(piece_lse[i], total_lse), v[i]);
    }
  }
  partial[warp][lane] = sum;
  __syncthreads();
  if (warp > 0) return;
#pragma unroll
  for (int i = 1; i < kWarps; ++i) add_scaled(sum, 1.0f, partial[i][lane]);
  const int64_t target = int64_t{sequence} * rows + row;
  store_columns(static_cast<T*>(params.out) + target * kValueDim, column, sum);
  if (column == 0) params.lse[target] = total_lse * kLn2;
}

template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    combine_kernel(DenseDecodeParams params) {
  __shared__ MergeList list;
  const int rows = params.s_q * params.h_q;
  const int total = list_merges(params, list);
  wait_for_prerequisites();
  launch_dependents();
  for (int task = blockIdx.x; task < total; task += gridDim.x) {
    // The part whose range of tasks this one is in, one past the merge's owner.
    const int part = __syncthreads_count(list.task_end[threadIdx.x] <= task);
    const int pieces = 2 + run_length(list.continues, part + 1);
    const int local = task - list.task_end[part - 1];
    const int sequence = list.cuts[part].sequence;
    const int item = local * kWarps + threadIdx.x / 32;  // of this warp
    switch (choose_team(pieces, list.one_round)) {
      case Team::kWarpRow:
        if (item < rows) merge_by_warp<T, kQuarters>(params, part - 1, pieces, sequence, item, 0);
        break;
      case Team::kWarpQuarter:
        if (item < rows * kQuarters) {
          merge_by_warp<T, 1>(params, part - 1, pieces, sequence, item / kQuarters,
                              item % kQuarters);
        }
        break;
      case Team::kBlockQuarter:
        merge_by_block<T>(params, part - 1, pieces, sequence, local / kQuarters, local % kQuarters);
    }
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
  const unsigned grid = std::min((params.num_parts - 1) * rows * kQuarters,
                                 multiprocessors * kBlocksPerMultiprocessor);
  LaunchOptions options{grid, kThreads};
  options.dependent = true;
  if (params.dtype == DType::kBFloat16) {
    return launch(combine_kernel<__nv_bfloat16>, options, stream, "dense_decode combine", params);
  }
  return launch(combine_kernel<__half>, options, stream, "dense_decode combine", params);
}

}  // namespace flashmla::sm90
