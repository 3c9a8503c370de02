// Merging one row, or a share of its columns, by a warp or a block:
// out = sum of w_i out_i / sum of w_i with w_i = 2^(lse_i - the largest lse_i), in a fixed order. A
// sink adds its own weight to the divisor.
#pragma once

#include <cuda_fp16.h>

#include <bit>

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

// Where a merged row goes. kSink: attn_sink is not null.
template <typename T, int kColumns, bool kSink>
struct ResultRow {
  const MergeParams& params;
  int64_t index;    // row of [b, rows]
  float sink_log2;  // loaded before the wait for the pieces, which has nothing to do with it

  __device__ __forceinline__ ResultRow(const MergeParams& params, int sequence, int row)
      : params(params), index(int64_t{sequence} * params.rows + row) {
    if constexpr (kSink) sink_log2 = params.attn_sink[row % params.h_q] * kLog2e;
  }

  // What the weighted sum of the pieces is to be multiplied with. total: sum of their weights,
  // which are relative to 2^peak.
  __device__ __forceinline__ float scale(float peak, float total) const {
    if (total == 0.0f) return 0.0f;
    if constexpr (kSink) total += exp2_approx(sink_log2 - peak);
    return reciprocal_approx(total);
  }

  // Stores two neighbouring columns: pair `j` of Columns number `i`.
  __device__ __forceinline__ void store_pair(int i, int j, float low, float high) const {
    auto* pairs = static_cast<uint32_t*>(params.out) + index * (kColumns / 2);
    pairs[i / 4 * 16 + j * 4 + i % 4] = pack<T>(low, high);
  }

  // Natural log-sum-exp of the row.
  __device__ __forceinline__ void store_lse(float peak, float total) const {
    params.lse[index] = total == 0.0f ? -INFINITY : (peak + __log2f(total)) * kLn2;
  }
};

// Eight columns: 16 bytes of a row of the workspace (partial.cuh).
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

  // As number `i` of the result's row.
  template <typename Result>
  __device__ __forceinline__ void store(const Result& result, int i) const {
#pragma unroll
    for (int j = 0; j < 4; ++j) result.store_pair(i, j, v[2 * j], v[2 * j + 1]);
  }
};

template <int kColumns>
constexpr int kUnits = kColumns / 8;  // Columns of a row

// One warp merges a row of kMaxPieces pieces, or of one less.
template <int kMaxPieces, typename T, int kColumns, bool kSink>
__device__ __forceinline__ void merge_row(const RowPieces<kColumns>& pieces,
                                          const ResultRow<T, kColumns, kSink>& result,
                                          Prerequisites& prerequisites) {
  static_assert(kUnits<kColumns> == 64, "a lane has one of each half row");
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
      scale[i] = *reinterpret_cast<const float2*>(rows[i] + partial_scale(kColumns));
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
  const float inverse = result.scale(peak, total);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    Columns sum = {};
#pragma unroll
    for (int i = 0; i < kMaxPieces; ++i) {
      sum.add_scaled((half == 0 ? scale[i].x : scale[i].y) * inverse, v[i][half]);
    }
    sum.store(result, half * 32 + lane);
  }
  if (lane == 0) result.store_lse(peak, total);
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

  template <int kColumns>
  __device__ __forceinline__ TeamPlace(const RowPieces<kColumns>& pieces, int thread, int threads,
                                       int share, int split) {
    const int shift = std::countr_zero(unsigned{kUnits<kColumns>}) - split;
    lanes = 1 << shift;
    turns = threads >> shift;
    column = share * lanes + (thread % 32 & (lanes - 1));
    const int half = share >> (split - 1);
    scale = pieces.row(thread) + partial_scale(kColumns) + half;
    lse = pieces.lse + pieces.offset(thread);
    pin_address(scale);
    pin_address(lse);
    first = thread >> shift;
  }
};

// One warp merges a share of a row of at most kWarpPieces pieces. A lane weighs its own, and the
// 32nd after it.
template <typename T, int kColumns, bool kSink>
__device__ __forceinline__ void merge_by_warp(const RowPieces<kColumns>& pieces,
                                              const ResultRow<T, kColumns, kSink>& result,
                                              int share, int split, Prerequisites& prerequisites) {
  const int lane = threadIdx.x % 32, next = lane + 32;
  const TeamPlace place(pieces, lane, 32, share, split);
  PieceLoads loads(pieces, place.first, place.turns, place.column);
  prerequisites.await();
  float lse = -INFINITY, factor = 0.0f, next_lse = -INFINITY, next_factor = 0.0f;
  if (lane < pieces.count) {
    lse = *place.lse;
    factor = *place.scale;
  }
  uint4 v[8];
  loads.load(v);
  if (next < pieces.count) {
    next_lse = pieces.lse[pieces.offset(next)];
    next_factor = pieces.row(next)[partial_scale(kColumns) + (share >> (split - 1))];
  }
  const float peak = warp_max(fmaxf(lse, next_lse));
  const float w = relative_weight(lse, peak), next_w = relative_weight(next_lse, peak);
  const float total = warp_sum(w + next_w), scale = result.scale(peak, total);
  factor *= w * scale;
  next_factor *= next_w * scale;
  if (share == 0 && lane == 0) result.store_lse(peak, total);  // here, as registers are short
  Columns sum = {};
  for (int piece = place.first;;) {
#pragma unroll
    for (int i = 0; i < 8; ++i, piece += place.turns) {
      sum.add_scaled(__shfl_sync(~0u, factor, piece % 32), v[i]);
    }
    if (piece - place.first >= pieces.count) break;
    loads.load(v);
    if (piece - place.first == 32) factor = next_factor;
  }
  sum.add_teams(place.lanes);
  if (lane < place.lanes) sum.store(result, place.column);
}

// One block merges a share of a row of any number of pieces.
template <typename T, int kColumns, bool kSink>
__device__ __forceinline__ void merge_by_block(const RowPieces<kColumns>& pieces,
                                               const ResultRow<T, kColumns, kSink>& result,
                                               int share, int split, Prerequisites& prerequisites) {
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
  const float inverse = result.scale(peak, total);
  result.store_pair(share * place.lanes + i, j, low * inverse, high * inverse);
  if (share == 0 && thread == 0) result.store_lse(peak, total);
}

}  // namespace flashmla::sm90::merge
