// Storing a value warpgroup's outputs: a piece that is a whole query token's as its result, others
// to the workspace (sm90/attention/partial.cuh).
#pragma once

#include "sm90/ptx/barrier.cuh"
#include "sm90/ptx/matrix.cuh"
#include "sm90/sparse_decode/narrow/shared_storage.cuh"
#include "sm90/sparse_decode/work.cuh"

namespace flashmla::sm90::sparse::narrow {

// The first of a value warpgroup's kCount tiles of 64 columns.
template <int kCount>
__device__ __forceinline__ int first_value_tile(int thread) {
  return kCount == kWideValues ? (thread / kWarpgroupThreads - 1) * 4 : 3;
}

// Puts into shared memory the exponents of each row's largest values in this warp, not normalised.
template <int kCount, typename Storage, int kElements>
__device__ __forceinline__ void find_exponents(Storage& smem, const float (&o)[kCount][kElements]) {
  constexpr int kMine = kElements / 2;
  const int thread = reread_thread();
  float peak[kMine] = {};
#pragma unroll
  for (int m = 0; m < kCount; ++m) {
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      peak[i] = fmaxf(peak[i], fmaxf(fabsf(o[m][element(i, 0)]), fabsf(o[m][element(i, 1)])));
    }
  }
#pragma unroll
  for (int step = 4; step <= 16; step *= 2) {
#pragma unroll
    for (int i = 0; i < kMine; ++i) peak[i] = fmaxf(peak[i], __shfl_xor_sync(~0u, peak[i], step));
  }
  if (thread % 32 < 4) {
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      smem.exponent[query_row(thread, i)][thread / 32 - kWarps] = __float_as_uint(peak[i]) >> 23;
    }
  }
}

// Of what find_exponents found makes what a row is to be multiplied with to be stored, and stores
// the scales that undo it. By thread `row` of the value warpgroups.
template <typename Storage>
__device__ __forceinline__ void choose_factor(Storage& smem, int row, bool stored, bool empty,
                                              float* rows) {
  const uint3 bytes = *reinterpret_cast<const uint3*>(smem.exponent[row]);
  uint32_t most = __vmaxu4(__vmaxu4(bytes.x, bytes.y), bytes.z);
  most = __vmaxu4(most, most >> 16);
  most = max(most & 0xff, most >> 8 & 0xff);
  const float below = __uint_as_float(most << 23);  // peak < 2 * below
  const float inverse = empty ? 0.0f : smem.inverse_sum[row];
  const int exponent = partial_exponent(below * inverse) + 1;
  smem.factor[row] = inverse * power_of_two(-exponent);
  if (stored) {
    const float scale = power_of_two(exponent);
    *reinterpret_cast<float2*>(rows + row * kValueDim + partial_scale(kValueDim)) = {scale, scale};
  }
}

template <int kCount, typename Storage, int kElements>
__device__ __forceinline__ void store_partial(const KernelArgs& args, Storage& smem,
                                              const float (&o)[kCount][kElements], HeadTile heads,
                                              bool empty, int slot) {
  const int thread = reread_thread(), lane = thread % 32, warp = thread / 32 % kWarps;
  const int first = first_value_tile<kCount>(thread);
  float* const rows = args.out_accum + (int64_t{slot} * args.h_q + heads.first) * kValueDim;
  find_exponents<kCount>(smem, o);
  named_barrier_sync(kValueBarrier, kValueWarps * 32);  // exponents are there
  const int row = thread - kWarpgroupThreads;
  if (row < 2 * kElements) choose_factor(smem, row, row < heads.count, empty, rows);
  named_barrier_sync(kValueBarrier, kValueWarps * 32);  // and factors
#pragma unroll
  for (int i = 0; i < kElements / 2; ++i) {
    const int head = query_row(thread, i);
    const float factor = smem.factor[head];
    // Words of the row: 16 bytes for each quad lane of each 32 columns; this thread's columns are
    // the pair lane / 4 of the warp's eight.
    auto* words = reinterpret_cast<uint32_t*>(rows + head * kValueDim) + first * 32 +
                  (warp / 2 * 4 + lane / 4 % 4) * 4 + warp % 2 * 2 + lane / 16;
#pragma unroll
    for (int m = 0; m < kCount; ++m) {
      const uint32_t v = pack<__half>(o[m][element(i, 0)] * factor, o[m][element(i, 1)] * factor);
      if (head < heads.count) words[m * value_tile_stride(kCount) * 32] = v;
    }
  }
}

template <typename T, int kCount, typename Storage, int kElements>
__device__ __forceinline__ void store_result(const KernelArgs& args, const Storage& smem,
                                             const float (&o)[kCount][kElements], HeadTile heads,
                                             bool empty, int query) {
  const int thread = reread_thread(), lane = thread % 32, warp = thread / 32 % kWarps;
  const int first = first_value_tile<kCount>(thread);
  T* const rows = static_cast<T*>(args.out) + (int64_t{query} * args.h_q + heads.first) * kValueDim;
#pragma unroll
  for (int i = 0; i < kElements / 2; ++i) {
    const int head = query_row(thread, i);
    const float factor = empty ? 0.0f : smem.inverse_sum[head];
    auto* words =
        reinterpret_cast<uint32_t*>(rows + head * kValueDim + first * 64 + warp * 16) + lane / 4;
#pragma unroll
    for (int m = 0; m < kCount; ++m) {
      const uint32_t v = pack<T>(o[m][element(i, 0)] * factor, o[m][element(i, 1)] * factor);
      if (head < heads.count) words[m * value_tile_stride(kCount) * 32] = v;
    }
  }
}

}  // namespace flashmla::sm90::sparse::narrow
