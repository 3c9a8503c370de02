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
constexpr int kMaxParts = kThreads;
constexpr int kFewPieces = 8;  // up to here one warp merges a row; above, a block a quarter row

// The cut sequences. A part owns the merge of a sequence that starts in it and goes on in the next.
struct MergeList {
  Cut cuts[kMaxParts + 1];
  int task_end[kMaxParts];  // running number of block tasks, by part
};

__device__ __forceinline__ bool continues(Cut previous, Cut cut) {
  return cut.tile > 0 && cut.sequence == previous.sequence && previous.tile > 0;
}

// Pieces of the sequence whose merge `part` owns; 0 where it owns none.
__device__ __forceinline__ int pieces_owned(const MergeList& list, int part, int num_parts) {
  const Cut next = list.cuts[part + 1];
  if (next.tile <= 0 || continues(list.cuts[part], next)) return 0;
  int last = part + 1;
  while (last + 1 < num_parts && continues(list.cuts[last], list.cuts[last + 1])) ++last;
  return last - part + 1;
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

// Log-sum-exp (base 2) of a row over its pieces; each lane of the warp gets it.
__device__ __forceinline__ float merged_lse(const float* lse, int64_t stride, int owner, int pieces) {
  float peak = -INFINITY;
  for (int i = threadIdx.x % 32; i < pieces; i += 32) peak = fmaxf(peak, lse[slot_of(owner, i) * stride]);
  peak = warp_max(peak);
  if (peak == -INFINITY) return -INFINITY;
  float sum = 0.0f;
  for (int i = threadIdx.x % 32; i < pieces; i += 32) {
    sum += exp2f(lse[slot_of(owner, i) * stride] - peak);
  }
  return peak + log2f(warp_sum(sum));
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

template <typename T>
__device__ __forceinline__ uint2 pack4(float4 v) {
  return {pack<T>(v.x, v.y), pack<T>(v.z, v.w)};
}

template <typename T>
__global__ void __launch_bounds__(kThreads) combine_kernel(DenseDecodeParams params) {
  __shared__ MergeList list;
  __shared__ float4 partial[kWarps][32];
  using Scan = cub::BlockScan<int, kThreads>;
  __shared__ typename Scan::TempStorage scan_storage;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int rows = params.s_q * params.h_q;

  for (int i = threadIdx.x; i <= params.num_parts; i += kThreads) {
    const int2 cut = reinterpret_cast<const int2*>(params.cuts)[i];
    list.cuts[i] = {cut.x, cut.x < params.b && cut.x >= 0 ? cut.y : 0};
  }
  __syncthreads();
  const int part = threadIdx.x;
  const int pieces_here = part < params.num_parts ? pieces_owned(list, part, params.num_parts) : 0;
  int tasks = 0;
  if (pieces_here > kFewPieces) tasks = rows * 4;
  else if (pieces_here > 0) tasks = (rows + kWarps - 1) / kWarps;
  int total;
  Scan(scan_storage).InclusiveSum(tasks, tasks, total);
  list.task_end[part] = tasks;
  wait_for_prerequisites();

  for (int task = blockIdx.x; task < total; task += gridDim.x) {
    const int owner = __syncthreads_count(list.task_end[threadIdx.x] <= task);
    const int pieces = pieces_owned(list, owner, params.num_parts);
    const int local = task - (owner == 0 ? 0 : list.task_end[owner - 1]);
    const int64_t sequence = list.cuts[owner + 1].sequence;

    if (pieces <= kFewPieces) {
      const int row = local * kWarps + warp;
      if (row >= rows) continue;
      const float* lse = params.lse_accum + row;
      const float total_lse = merged_lse(lse, rows, owner, pieces);
      float4 sum[4] = {};
      for (int i = 0; i < pieces; ++i) {
        const int64_t index = int64_t{slot_of(owner, i)} * rows;
        const float w = weight(lse[index], total_lse);
        const auto* source =
            reinterpret_cast<const float4*>(params.out_accum + (index + row) * kValueDim) + lane;
#pragma unroll
        for (int j = 0; j < 4; ++j) add_scaled(sum[j], w, source[j * 32]);
      }
      const int64_t target = sequence * rows + row;
      auto* out = reinterpret_cast<uint2*>(static_cast<T*>(params.out) + target * kValueDim) + lane;
#pragma unroll
      for (int j = 0; j < 4; ++j) out[j * 32] = pack4<T>(sum[j]);
      if (lane == 0) params.lse[target] = total_lse * 0.6931471805599453f;
    } else {
      const int row = local / 4, column = (local % 4) * 32 + lane;  // column in float4
      const float* lse = params.lse_accum + row;
      const float total_lse = merged_lse(lse, rows, owner, pieces);
      float4 sum = {};
#pragma unroll 8
      for (int i = warp; i < pieces; i += kWarps) {
        const int64_t index = int64_t{slot_of(owner, i)} * rows;
        const auto* source =
            reinterpret_cast<const float4*>(params.out_accum + (index + row) * kValueDim);
        add_scaled(sum, weight(lse[index], total_lse), source[column]);
      }
      partial[warp][lane] = sum;
      __syncthreads();
      if (warp == 0) {
        sum = partial[0][lane];
        for (int i = 1; i < kWarps; ++i) add_scaled(sum, 1.0f, partial[i][lane]);
        const int64_t target = sequence * rows + row;
        reinterpret_cast<uint2*>(static_cast<T*>(params.out) + target * kValueDim)[column] =
            pack4<T>(sum);
        if (column == 0) params.lse[target] = total_lse * 0.6931471805599453f;
      }
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
  const unsigned grid = std::min((params.num_parts - 1) * rows * 4, 4 * 132);
  LaunchOptions options{grid, kThreads};
  options.dependent = true;
  if (params.dtype == DType::kBFloat16) {
    return launch(combine_kernel<__nv_bfloat16>, options, stream, "dense_decode combine", params);
  }
  return launch(combine_kernel<__half>, options, stream, "dense_decode combine", params);
}

}  // namespace flashmla::sm90
