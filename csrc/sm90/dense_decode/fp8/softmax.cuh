// The softmax of the query rows over a tile's tokens, which lie across a side's threads. Registers
// named by `i` belong to a thread's query rows.
#pragma once

#include "sm90/attention/mask.cuh"
#include "sm90/attention/softmax.cuh"
#include "sm90/dense_decode/fp8/shared_storage.cuh"
#include "sm90/ptx/barrier.cuh"
#include "sm90/ptx/matrix.cuh"

namespace flashmla::sm90::dense_decode::fp8 {

// Query rows that a thread has.
template <int kRows>
constexpr int kMine = kRows / 4;

// Of them, those of whose sums over a warp's tokens a lane keeps one: from number
// lane / 4 * kMine / 8 on. (With 16 rows two lanes keep the same.)
template <int kRows>
constexpr int kSums = kRows > 32 ? kMine<kRows> / 8 : 1;

// The query row of a lane's sum j.
template <int kRows>
__device__ __forceinline__ int sum_row(int thread, int j) {
  return query_row(thread, thread % 32 / 4 * kMine<kRows> / 8 + j);
}

// Adds a tile's probabilities to the sums.
template <int kRows>
__device__ __forceinline__ void add_to_sums(float (&sum)[kSums<kRows>],
                                            const float (&p)[kRows / 2]) {
  const int thread = reread_thread();
  float x[kMine<kRows>];
#pragma unroll
  for (int i = 0; i < kMine<kRows>; ++i) x[i] = p[element(i, 0)] + p[element(i, 1)];
  int count = kMine<kRows>;  // of x, that are left: known to the compiler, as loops are unrolled
#pragma unroll
  for (int lane = 16; lane >= 4; lane /= 2) {
    if (count == 1) {
      x[0] += __shfl_xor_sync(~0u, x[0], lane);
      continue;
    }
    const bool upper = thread & lane;
    count /= 2;
#pragma unroll
    for (int k = 0; k < kMine<kRows> / 2; ++k) {
      if (k >= count) break;
      const float other = __shfl_xor_sync(~0u, upper ? x[k] : x[k + count], lane);
      x[k] = (upper ? x[k + count] : x[k]) + other;
    }
  }
#pragma unroll
  for (int j = 0; j < kSums<kRows>; ++j) sum[j] += x[j];
}

// The largest of what all threads of the side have of a row. Ends with all warps having read.
template <int kRows>
__device__ __forceinline__ void combine_peaks(float (*exchange)[kRows], float (&x)[kMine<kRows>]) {
  const int thread = reread_thread(), side = reread_side(), warp = thread / 32 % kWarps;
#pragma unroll
  for (int lane = 4; lane <= 16; lane *= 2) {
#pragma unroll
    for (int i = 0; i < kMine<kRows>; ++i) x[i] = fmaxf(x[i], __shfl_xor_sync(~0u, x[i], lane));
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
    x[i] =
        fmaxf(fmaxf(exchange[0][row], exchange[1][row]), fmaxf(exchange[2][row], exchange[3][row]));
  }
  named_barrier_sync(kScoreBarrier + side, kWarpgroupThreads);
}

// Sets scores of keys that a row may not see to -inf. first_row: the tile's, within [s_q, h_q];
// left: tokens of the sequence from the tile's first on.
template <typename Format, int kRows>
__device__ __forceinline__ void mask_tile(const KernelArgs& args, int first_row,
                                          float (&s)[kRows / 2], int left) {
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

// Moves references to a tile's largest scores, which `peak` has of this thread. By what power of
// two sums and output are to be divided goes to `rescale`.
template <int kRows>
__device__ __forceinline__ void raise_references(float (*exchange)[kRows], float* references,
                                                 float* offsets, float (&peak)[kMine<kRows>],
                                                 uint8_t* rescale) {
  const int thread = reread_thread(), side = reread_side();
  combine_peaks<kRows>(exchange, peak);
#pragma unroll
  for (int i = 0; i < kMine<kRows>; ++i) {
    const int row = query_row(thread, i);
    float moved = references[row];
    const int power = raise_reference(moved, peak[i]);
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

// Divides sums as raise_references has told.
template <int kRows>
__device__ __forceinline__ void rescale_sums(float (&sum)[kSums<kRows>], const uint8_t* rescale) {
  const int thread = reread_thread();
#pragma unroll
  for (int j = 0; j < kSums<kRows>; ++j) {
    sum[j] *= rescale_factor(rescale[sum_row<kRows>(thread, j)]);
  }
}

// What a thread's rows have in shared memory.
template <int kRows>
__device__ __forceinline__ void load_rows(float (&x)[kMine<kRows>], const float* rows) {
  const int thread = reread_thread();
#pragma unroll
  for (int i = 0; i < kMine<kRows>; i += 2) {
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
                 : "=f"(x[i]), "=f"(x[i + 1])
                 : "r"(smem_address(rows + query_row(thread, i)))
                 : "memory");
  }
}

// Turns scores, less their offsets, into probabilities.
template <int kRows>
__device__ __forceinline__ void make_probabilities(float (&s)[kRows / 2]) {
#pragma unroll
  for (int i = 0; i < kRows / 2; ++i) s[i] = exp2_approx(s[i]);
}

// Stores probabilities as wgmma's B operand: K-major rows of 64 tokens in the 128-byte swizzle.
template <typename T, int kRows>
__device__ __forceinline__ void store_probabilities(const float (&p)[kRows / 2], uint32_t target) {
  const int thread = reread_thread(), lane = thread % 32;
  const int matrix = lane / 8;  // tokens % 16 / 8, rows % 16 / 8
  const int piece = thread / 32 % kWarps * 2 + matrix % 2;
#pragma unroll
  for (int rows = 0; rows < kRows; rows += 16) {
    uint32_t packed[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int i = rows / 4 + j / 2 * 2;
      packed[j] = pack<T>(p[element(i, j % 2)], p[element(i + 1, j % 2)]);
    }
    store_matrix_x4_trans(target + swizzled_offset(rows + matrix / 2 * 8 + lane % 8, piece),
                          packed[0], packed[1], packed[2], packed[3]);
  }
}

}  // namespace flashmla::sm90::dense_decode::fp8
