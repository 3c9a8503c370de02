// A tile of 64 query rows that a score warpgroup keeps: 496 latent columns as wgmma A fragments in
// registers, the last 16 and the rope columns in shared memory; and its products with 64 tokens'
// keys, whose columns lie in two halves of four chunks: eight tokens' chunks, then the next
// eight's.
#pragma once

#include "sm90/ptx/smem_desc.cuh"
#include "sm90/ptx/wgmma.cuh"

namespace flashmla::sm90 {

constexpr int kQueryStepsInRegisters = 31;                   // of 16 latent columns, of 32 in all
using QueryFragments = uint32_t[kQueryStepsInRegisters][4];  // k16 step, A fragment
using QueryStep = uint8_t[2][64][16];                        // eight columns, then eight, by row

// s (+)= the products with latent chunk `c`, 0 to 7. half: where the chunk's half lies.
template <typename T>
__device__ __forceinline__ void multiply_latent_chunk(float (&s)[32], const QueryFragments& q,
                                                      const QueryStep& query_step, uint32_t half,
                                                      int c) {
  const uint64_t keys = k_major_desc(half + c % 4 * kGroupBytes, 4 * kGroupBytes);
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const int step = c * 4 + k;
    if (step < kQueryStepsInRegisters) {
      wgmma_rs<T>(s, q[step], keys + 2 * k, step > 0);
    } else {
      wgmma_ss<T>(s, unswizzled_desc(smem_address(query_step), 64 * 16, 8 * 16), keys + 2 * k, 1);
    }
  }
}

// s += the products with the rope columns.
template <typename T>
__device__ __forceinline__ void multiply_rope(float (&s)[32], uint32_t query_rope, uint32_t rope) {
  const uint64_t query = k_major_desc(query_rope), keys = k_major_desc(rope);
#pragma unroll
  for (int k = 0; k < 4; ++k) wgmma_ss<T>(s, query + 2 * k, keys + 2 * k, 1);
}

}  // namespace flashmla::sm90
