// The softmax of a side's own query rows over a tile's tokens, which lie across a warpgroup's
// threads. Registers named by `i` belong to a thread's query rows.
#pragma once

#include "sm90/attention/mask.cuh"
#include "sm90/attention/softmax.cuh"
#include "sm90/dense_decode/fp8/shared_storage.cuh"
#include "sm90/ptx/barrier.cuh"
#include "sm90/ptx/matrix.cuh"

namespace flashmla::sm90::dense_decode::fp8 {

// Query rows, of a side's own, that a thread has.
template <int kRows>
constexpr int kMine = kRows / kSides / 4;

// Combines what all threads of the side have of a row. Ends with all warps having read.
template <int kRows, typename Combine>
__device__ __forceinline__ void combine_rows(float (*exchange)[kRows / kSides],
                                             float (&x)[kMine<kRows>], Combine combine) {
  const int thread = reread_thread(), side = reread_side(), warp = thread / 32 % kWarps;
#pragma unroll
  for (int lane = 4; lane <= 16; lane *= 2) {
#pragma unroll
    for (int i = 0; i < kMine<kRows>; ++i) x[i] = combine(x[i], __shfl_xor_sync(~0u, x[i], lane));
  }
  if (thread % 32 < 4) {
#pragma unroll
    for (int i = 0; i < kMine<kRows>; i += 2) {
      *reinterpret_cast<float2*>(&exchange[warp][query_row(thread, i)]) = {x[i], x[i + 1]};
    }
  }
  named_barrier_sync(kScoreBarrier + side, kWarpgroupThreads);
#pragma unroll
  for (int i = 0; i < kMine<kRows>; ++i) {
    const int row = query_row(thread, i);
    x[i] = combine(combine(exchange[0][row], exchange[1][row]),
                   combine(exchange[2][row], exchange[3][row]));
  }
  named_barrier_sync(kScoreBarrier + side, kWarpgroupThreads);
}

// Sets scores of keys that a row may not see to -inf. first_row: the side's, within [s_q, h_q];
// left: tokens of the sequence from the tile's first on.
template <typename Format, int kRows>
__device__ __forceinline__ void mask_tile(const KernelArgs& args, int first_row,
                                          float (&s)[kRows / kSides / 2], int left) {
  const int thread = reread_thread();
  const int place = thread / 32 % kWarps * kWarpTokens + thread % 32 / 4;
#pragma unroll
  for (int i = 0; i < kMine<kRows>; ++i) {
    const uint32_t row = first_row + query_row(thread, i);
    const int seen = seen_tokens(left, row, args.h_q, args.s_q, args.causal);
    if (Format::token_at(place) >= seen) s[element(i, 0)] = -INFINITY;
    if (Format::token_at(place + 8) >= seen) s[element(i, 1)] = -INFINITY;
  }
}

// Moves references to a tile's largest scores, which `peak` has of this thread, and its sums
// with them. By what power of two the output is to be divided goes to `rescale`. reference, offset:
// of the side's rows.
template <int kRows>
__device__ __forceinline__ void raise_references(float (*exchange)[kRows / kSides],
                                                 float* references, float* offsets,
                                                 float (&peak)[kMine<kRows>],
                                                 float (&sum)[kMine<kRows>], uint8_t* rescale) {
  const int thread = reread_thread(), side = reread_side();
  combine_rows<kRows>(exchange, peak, [](float a, float b) { return fmaxf(a, b); });
#pragma unroll
  for (int i = 0; i < kMine<kRows>; ++i) {
    const int row = query_row(thread, i);
    float moved = references[row];
    const int power = raise_reference(moved, peak[i]);
    sum[i] *= rescale_factor(power);
    peak[i] = moved;
    if (thread % kWarpgroupThreads < 4) rescale[row] = power;
  }
  named_barrier_sync(kScoreBarrier + side, kWarpgroupThreads);  // all have read the references
  if (thread % kWarpgroupThreads < 4) {
#pragma unroll
    for (int i = 0; i < kMine<kRows>; ++i) {
      references[query_row(thread, i)] = peak[i];
      offsets[query_row(thread, i)] = finite_reference(peak[i]);
    }
  }
  named_barrier_sync(kScoreBarrier + side, kWarpgroupThreads);
}

// Turns scores into probabilities and adds them to the sums.
template <int kRows>
__device__ __forceinline__ void make_probabilities(const float* offsets,
                                                   float (&s)[kRows / kSides / 2],
                                                   float (&sum)[kMine<kRows>]) {
  const int thread = reread_thread();
#pragma unroll
  for (int i = 0; i < kMine<kRows>; ++i) {
    const float offset = offsets[query_row(thread, i)];
    float(&low) = s[element(i, 0)], (&high) = s[element(i, 1)];
    low = exp2_approx(__fsub_rn(low, offset));
    high = exp2_approx(__fsub_rn(high, offset));
    sum[i] += low + high;
  }
}

// Stores probabilities as wgmma's B operand: K-major rows of 64 tokens in the 128-byte swizzle.
// target: of the side's rows.
template <typename T, int kRows>
__device__ __forceinline__ void store_probabilities(const float (&p)[kRows / kSides / 2],
                                                    uint32_t target) {
  constexpr int kOwnRows = kRows / kSides;
  const int thread = reread_thread(), lane = thread % 32;
  const int matrix = lane / 8;  // tokens % 16 / 8, rows % 16 / 8
  const int piece = thread / 32 % kWarps * 2 + matrix % 2;
#pragma unroll
  for (int rows = 0; rows < kOwnRows; rows += 16) {
    uint32_t packed[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int i = rows / 4 + j / 2 * 2;
      if (i < kMine<kRows>) packed[j] = pack<T>(p[element(i, j % 2)], p[element(i + 1, j % 2)]);
    }
    if constexpr (kOwnRows < 16) {
      store_matrix_x2_trans(target + swizzled_offset(lane % 8, piece), packed[0], packed[1]);
    } else {
      store_matrix_x4_trans(target + swizzled_offset(rows + matrix / 2 * 8 + lane % 8, piece),
                            packed[0], packed[1], packed[2], packed[3]);
    }
  }
}

}  // namespace flashmla::sm90::dense_decode::fp8
