// A tile's products with the queries: tokens are M, query heads N.
#pragma once

#include "sm90/index_scores/products.cuh"
#include "sm90/index_scores/shared_storage.cuh"
#include "sm90/ptx/matrix.cuh"

namespace flashmla::sm90::index_scores {

// e4m3 queries: QGMMA, 32 columns a step.
template <int kCount>
__device__ __forceinline__ void multiply_codes(float (&d)[kCount], uint32_t keys,
                                               uint32_t queries) {
  const uint64_t a = k_major_desc(keys), b = k_major_desc(queries);
  wgmma_fence();
#pragma unroll
  for (int i = 0; i < 4; ++i) multiply(d, a + 2 * i, b + 2 * i, i > 0);
  wgmma_commit();
}

// Two e4m3 codes as bf16, exactly; NaN stays NaN.
__device__ __forceinline__ uint32_t to_bf16(uint16_t codes) {
  uint32_t half;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(half) : "h"(codes));
  const float2 pair = __half22float2(reinterpret_cast<const __half2&>(half));
  return pack<__nv_bfloat16>(pair.x, pair.y);
}

__device__ __forceinline__ uint16_t load_codes(uint32_t address) {
  uint16_t codes;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(codes) : "r"(address) : "memory");
  return codes;
}

// bf16 queries: the keys are converted into fragments, 16 columns a step. A thread holds of rows
// lane / 4 and 8 below it the columns 2 (lane % 4) and the next, and those 8 further.
template <int kCount>
__device__ __forceinline__ void multiply_bf16(float (&d)[kCount], uint32_t keys, uint32_t queries) {
  constexpr int kSteps = kIndexColumns / 16;
  constexpr int kHalfBytes = kCount * 2 * 128;  // of the queries' first 64 columns
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % kWarps;
  const uint32_t row = keys + (warp * 16 + lane / 4) * 128 + lane % 4 * 2;
  uint32_t a[kSteps][4];
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t piece = (step ^ (lane / 4)) << 4;
      a[step][i] = to_bf16(load_codes(row + piece + (i & 1) * 8 * 128 + (i >> 1) * 8));
    }
  }
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const uint64_t b = k_major_desc(queries + step / 4 * kHalfBytes) + step % 4 * 2;
    multiply(d, a[step], b, step > 0);
  }
  wgmma_commit();
}

template <bool kFp8, int kCount>
__device__ __forceinline__ void multiply_tile(float (&d)[kCount], const uint8_t* keys,
                                              const uint8_t* queries) {
  if constexpr (kFp8)
    multiply_codes(d, smem_address(keys), smem_address(queries));
  else
    multiply_bf16(d, smem_address(keys), smem_address(queries));
}

}  // namespace flashmla::sm90::index_scores
