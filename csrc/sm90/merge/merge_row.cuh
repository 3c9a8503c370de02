// Merging one row, or a share of its columns, by a warp or a block:
// out = sum of w_i out_i / sum of w_i with w_i = 2^(lse_i - the largest lse_i), in a fixed order.
#pragma once

#include <cuda_fp16.h>

#include "sm90/merge/merge_task.cuh"
#include "sm90/merge/row_pieces.cuh"
#include "sm90/ptx/math.cuh"
#include "sm90/ptx/matrix.cuh"

namespace flashmla::sm90::merge {

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

// A piece's share of the row's sum, relative to the largest one's; 0 where no piece saw a key.
__device__ __forceinline__ float relative_weight(float lse, float peak) {
  return peak == -INFINITY ? 0.0f : exp2_approx(lse - peak);
}

__device__ __forceinline__ float inverse_of_weights(float total) {
  return total == 0.0f ? 0.0f : reciprocal_approx(total);
}

// Natural log-sum-exp of the row.
__device__ __forceinline__ float merged_lse(float peak, float total) {
  return total == 0.0f ? -INFINITY : (peak + __log2f(total)) * kLn2;
}

// Stores two neighbouring columns: pair `j` of Columns number `i` of a row of the result.
template <typename T>
__device__ __forceinline__ void store_pair(const DenseDecodeParams& params, int64_t row, int i,
                                           int j, float low, float high) {
  auto* pairs = static_cast<uint32_t*>(params.out) + row * (kValueDim / 2);
  pairs[i / 4 * 16 + j * 4 + i % 4] = pack<T>(low, high);
}

// Eight columns: one of the 64 pieces of 16 bytes of a row of the workspace (partial.cuh).
struct Columns {
  float v[8];

  __device__ __forceinline__ void add_scaled(float w, uint4 piece) {
    const uint32_t packed[4] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&packed[j]));
      v[2 * j] += w * pair.x;
      v[2 * j + 1] += w * pair.y;
    }
  }

  // Adds up the columns that the warp's groups of `lanes` lanes have.
  __device__ __forceinline__ void add_teams(int lanes) {
#pragma unroll 1
    for (; lanes < 32; lanes *= 2) {
#pragma unroll
      for (int j = 0; j < 8; ++j) v[j] += __shfl_xor_sync(~0u, v[j], lanes);
    }
  }

  template <typename T>
  __device__ __forceinline__ void store(const DenseDecodeParams& params, int64_t row, int i) const {
#pragma unroll
    for (int j = 0; j < 4; ++j) store_pair<T>(params, row, i, j, v[2 * j], v[2 * j + 1]);
  }
};

// One warp merges a row of kMaxPieces pieces, or of one less.
template <typename T, int kMaxPieces>
__device__ __forceinline__ void merge_row(const DenseDecodeParams& params, const RowPieces& pieces,
                                          int64_t target, Prerequisites& prerequisites) {
  const int lane = threadIdx.x % 32;
  const float *rows[kMaxPieces], *lses[kMaxPieces];
#pragma unroll
  for (int i = 0; i < kMaxPieces; ++i) {
    rows[i] = pieces.row(i);
    lses[i] = pieces.lse + pieces.offset(i);
    pin_address(rows[i]);
    pin_address(lses[i]);
  }
  prerequisites.await();
  float lse[kMaxPieces], peak = -INFINITY, total = 0.0f;
  float2 scale[kMaxPieces] = {};  // of the left and the right half
  uint4 v[kMaxPieces][2] = {};
#pragma unroll
  for (int i = 0; i < kMaxPieces; ++i) {
    const bool there = i < kMaxPieces - 1 || kMaxPieces == 2 || i < pieces.count;
    const auto* columns = reinterpret_cast<const uint4*>(rows[i]) + lane;
    lse[i] = there ? *lses[i] : -INFINITY;
    if (there) {
      scale[i] = *reinterpret_cast<const float2*>(rows[i] + kPartialScale);
      v[i][0] = columns[0];
      v[i][1] = columns[32];
    }
  }
#pragma unroll
  for (int i = 0; i < kMaxPieces; ++i) peak = fmaxf(peak, lse[i]);
#pragma unroll
  for (int i = 0; i < kMaxPieces; ++i) {
    const float w = relative_weight(lse[i], peak);
    total += w;
    scale[i].x *= w;
    scale[i].y *= w;
  }
  const float inverse = inverse_of_weights(total);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    Columns sum = {};
#pragma unroll
    for (int i = 0; i < kMaxPieces; ++i) {
      sum.add_scaled((half == 0 ? scale[i].x : scale[i].y) * inverse, v[i][half]);
    }
    sum.template store<T>(params, target, half * 32 + lane);
  }
  if (lane == 0) params.lse[target] = merged_lse(peak, total);
}

// A thread's place in a team that merges one of the 2^split shares of a row. `lanes` threads take
// the share's columns of one piece, the next ones those of the next piece, in turns:
//
//   thread   0 .. lanes - 1 | lanes .. 2 lanes - 1 | ...
//   piece    0              | 1                    | ...  then each its own + turns, + 2 turns ...
//   weighs   thread i has the weight of piece i
struct TeamPlace {
  int lanes;                 // 32, 16 or 8
  int turns;                 // pieces that the team takes at once
  int column, first;         // this thread's columns, in units of eight, and its first piece
  const float *lse, *scale;  // of the piece that it weighs

  __device__ __forceinline__ TeamPlace(const RowPieces& pieces, int thread, int threads, int share,
                                       int split) {
    const int shift = 6 - split;
    lanes = 1 << shift;
    turns = threads >> shift;
    column = share * lanes + (thread % 32 & (lanes - 1));
    const int half = share >> (split - 1);
    scale = pieces.row(thread) + kPartialScale + half;
    lse = pieces.lse + pieces.offset(thread);
    pin_address(scale);
    pin_address(lse);
    first = thread >> shift;
  }
};

// One warp merges a share of a row of at most 32 pieces.
template <typename T>
__device__ __forceinline__ void merge_by_warp(const DenseDecodeParams& params,
                                              const RowPieces& pieces, int64_t target, int share,
                                              int split, Prerequisites& prerequisites) {
  const int lane = threadIdx.x % 32;
  const TeamPlace place(pieces, lane, 32, share, split);
  PieceLoads loads(pieces, place.first, place.turns, place.column);
  prerequisites.await();
  float lse = -INFINITY, factor = 0.0f;
  if (lane < pieces.count) {
    lse = *place.lse;
    factor = *place.scale;
  }
  uint4 v[8];
  loads.load(v);
  const float peak = warp_max(lse), w = relative_weight(lse, peak), total = warp_sum(w);
  factor *= w * inverse_of_weights(total);
  Columns sum = {};
  for (int piece = place.first;;) {
#pragma unroll
    for (int i = 0; i < 8; ++i, piece += place.turns) {
      sum.add_scaled(__shfl_sync(~0u, factor, piece % 32), v[i]);
    }
    if (piece - place.first >= pieces.count) break;
    loads.load(v);
  }
  sum.add_teams(place.lanes);
  if (lane < place.lanes) sum.template store<T>(params, target, place.column);
  if (share == 0 && lane == 0) params.lse[target] = merged_lse(peak, total);
}

// One block merges a share of a row of any number of pieces.
template <typename T>
__device__ __forceinline__ void merge_by_block(const DenseDecodeParams& params,
                                               const RowPieces& pieces, int64_t target, int share,
                                               int split, Prerequisites& prerequisites) {
  __shared__ Columns partial[kWarps][32];
  __shared__ float weights[kMaxParts], peaks[kWarps], totals[kWarps];
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const TeamPlace place(pieces, thread, kThreads, share, split);
  PieceLoads loads(pieces, place.first, place.turns, place.column);
  prerequisites.await();
  float lse = -INFINITY, scale = 0.0f;
  if (thread < pieces.count) {
    lse = *place.lse;
    scale = *place.scale;
  }
  uint4 v[4];
  loads.load(v);
  float peak = warp_max(lse);
  if (lane == 0) peaks[warp] = peak;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kWarps; ++i) peak = fmaxf(peak, peaks[i]);
  const float w = relative_weight(lse, peak), of_warp = warp_sum(w);
  weights[thread] = w * scale;
  if (lane == 0) totals[warp] = of_warp;
  __syncthreads();
  Columns sum = {};
  for (int piece = place.first;;) {
#pragma unroll
    for (int i = 0; i < 4; ++i, piece += place.turns) {
      sum.add_scaled(weights[piece % kMaxParts], v[i]);
    }
    if (piece - place.first >= pieces.count) break;
    loads.load(v);
  }
  sum.add_teams(place.lanes);
  if (lane < place.lanes) partial[warp][lane] = sum;
  __syncthreads();
  if (thread >= place.lanes * 4) return;
  const int i = thread / 4, j = thread % 4;  // a pair of columns
  float low = 0.0f, high = 0.0f, total = 0.0f;
#pragma unroll
  for (int of = 0; of < kWarps; ++of) {
    low += partial[of][i].v[2 * j];
    high += partial[of][i].v[2 * j + 1];
    total += totals[of];
  }
  const float inverse = inverse_of_weights(total);
  store_pair<T>(params, target, share * place.lanes + i, j, low * inverse, high * inverse);
  if (share == 0 && thread == 0) params.lse[target] = merged_lse(peak, total);
}

}  // namespace flashmla::sm90::merge
