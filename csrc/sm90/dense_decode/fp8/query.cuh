// The queries of a piece, by the score warps: copied to where products read them, then scaled
// there.
#pragma once

#include "sm90/attention/partial.cuh"
#include "sm90/dense_decode/fp8/shared_storage.cuh"
#include "sm90/ptx/barrier.cuh"
#include "sm90/ptx/copy_async.cuh"
#include "sm90/ptx/matrix.cuh"
#include "sm90/ptx/tma.cuh"

namespace flashmla::sm90::dense_decode::fp8 {

// Four pairs of bf16 queries, times a power of two, in f16 or bf16.
template <typename T>
__device__ __forceinline__ uint4 scale_queries(const uint32_t (&pairs)[4], float factor) {
  uint32_t words[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    words[j] = pack<T>(__uint_as_float(pairs[j] << 16) * factor,
                       __uint_as_float(pairs[j] & 0xffff0000) * factor);
  }
  return {words[0], words[1], words[2], words[3]};
}

// Calls take(row, unit, address of its first and of its second half) for a score thread's own
// units: of the 36 of a row, sixteen columns each, 32 bytes, four in a chunk.
template <int kRows, typename Take>
__device__ __forceinline__ void for_own_units(
    const uint8_t (&query)[kHeadDim / 64][kRows * kChunkRowBytes], Take take) {
  constexpr int kStep = kRoleThreads / 4 / kRows;  // chunks that the threads take at once
  const int thread = reread_thread(), row = thread / 4 % kRows;
#pragma unroll
  for (int first = 0; first < kHeadDim / 64; first += kStep) {
    const int chunk = kStep == 1 ? first : first + thread / 4 / kRows;
    if (chunk >= kHeadDim / 64) break;
    const int unit = chunk * 4 + thread % 4;
    const uint32_t target = smem_address(query[chunk]);
    take(row, unit, target + swizzled_offset(row, unit % 4 * 2),
         target + swizzled_offset(row, unit % 4 * 2 + 1));
  }
}

// Sends a sequence's queries on their way. By all score warps, once no products are under way.
template <typename Format, int kRows>
__device__ __forceinline__ void copy_query(const KernelArgs& args,
                                           SharedStorage<Format, kRows>& smem, int sequence) {
  const int count = smem.row_tile.count;
  const uint8_t* const q =
      args.q + (int64_t{sequence} * args.rows + smem.row_tile.first) * (kHeadDim * 2);
  for_own_units<kRows>(smem.query, [&](int row, int unit, uint32_t first, uint32_t second) {
    const bool valid = row < count;
    const uint8_t* const source = q + (valid ? row : 0) * (kHeadDim * 2) + unit * 32;
    copy_16_or_zero(first, source, valid);
    copy_16_or_zero(second, source + 16, valid);
  });
}

// Takes the queries that copy_query sent, divided by a power of two so that their largest is just
// within f16; infinities and NaN do not count. smem.score_scale makes up for it. Code columns come
// in f16 and permuted within each sixteen as convert_keys permutes the keys': column pair 2t to
// place t, 2t + 1 to t + 4. A rope of 16-bit columns stays bf16. By all score warps; each thread
// finds what it copied itself.
template <typename Format, int kRows>
__device__ __forceinline__ void take_query(const KernelArgs& args,
                                           SharedStorage<Format, kRows>& smem, int sequence) {
  if (threadIdx.x == 0 && owns_work(smem.begin, smem.end, sequence + 1)) {  // the next ones to L2
    prefetch_bulk(
        args.q + (int64_t{sequence + 1} * args.rows + smem.row_tile.first) * (kHeadDim * 2),
        smem.row_tile.count * (kHeadDim * 2));
  }
  asm volatile("cp.async.wait_all;" ::: "memory");
  uint32_t peak = 0;
  for_own_units<kRows>(smem.query, [&](int, int, uint32_t first, uint32_t second) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint4 v = load_shared(half == 0 ? first : second);
      const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint32_t magnitude = words[j] & 0x7fff7fff;
        peak = __vmaxu2(peak, magnitude & __vcmpltu2(magnitude, 0x7f807f80));
      }
    }
  });
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) {
    peak = __vmaxu2(peak, __shfl_xor_sync(~0u, peak, lane));
  }
  if (reread_thread() % 32 == 0) smem.query_peak[reread_thread() / 32] = peak;
  named_barrier_sync(kPairBarrier, kRoleThreads);
#pragma unroll
  for (int warp = 0; warp < kRoleWarps; ++warp) peak = __vmaxu2(peak, smem.query_peak[warp]);
  int exponent = int(max(peak & 0xffff, peak >> 16) >> 7) - 127;
  exponent = min(max(exponent - 14, -100), 112);
  const float factor = power_of_two(-exponent);
  for_own_units<kRows>(smem.query, [&](int, int unit, uint32_t first, uint32_t second) {
    const uint4 low = load_shared(first), high = load_shared(second);
    if (Format::kScales && unit >= kValueDim / 16) {
      const uint32_t a[4] = {low.x, low.y, low.z, low.w}, b[4] = {high.x, high.y, high.z, high.w};
      store_shared(first, scale_queries<__nv_bfloat16>(a, factor));
      store_shared(second, scale_queries<__nv_bfloat16>(b, factor));
    } else {
      const uint32_t a[4] = {low.x, low.z, high.x, high.z}, b[4] = {low.y, low.w, high.y, high.w};
      store_shared(first, scale_queries<__half>(a, factor));
      store_shared(second, scale_queries<__half>(b, factor));
    }
  });
  if (reread_thread() == 0) {
    float scale = args.scale_log2 * power_of_two(exponent);
    if constexpr (!Format::kScales) scale *= *args.kv_scale;
    smem.score_scale = scale;
  }
  fence_async_proxy();
  named_barrier_sync(kPairBarrier, kRoleThreads);
}

}  // namespace flashmla::sm90::dense_decode::fp8
