// A tile of 64 query rows that a score warpgroup keeps: 496 latent columns as wgmma A fragments in
// registers, the last 16 and the rope columns in shared memory; and its products with 64 tokens'
// keys, whose columns lie in two halves of four chunks: eight tokens' chunks, then the next
// eight's.
#pragma once

#include "sm90/ptx/barrier.cuh"
#include "sm90/ptx/matrix.cuh"
#include "sm90/ptx/smem_desc.cuh"
#include "sm90/ptx/thread.cuh"
#include "sm90/ptx/warpgroup.h"
#include "sm90/ptx/wgmma.cuh"

namespace flashmla::sm90 {

constexpr int kQueryStepsInRegisters = 31;                   // of 16 latent columns, of 32 in all
using QueryFragments = uint32_t[kQueryStepsInRegisters][4];  // k16 step, A fragment
using QueryStep = uint8_t[2][64][16];                        // eight columns, then eight, by row
constexpr int kQueryHalfBytes = 32768;                       // from 256 columns to the others

// Takes the rows out of where TMA has loaded them: latent columns in two boxes of four chunks of
// `box` rows, 32 KB apart, and rope columns. Rows past the box are whatever is there; their results
// are not stored. Called by the score warpgroup with no wgmma in flight; `barrier` is a named
// barrier of its own.
template <bool kRope>
__device__ __forceinline__ void take_query(QueryFragments& fragments, QueryStep& query_step,
                                           uint32_t query_rope, uint32_t latent, uint32_t rope,
                                           int box, int barrier) {
  const int chunk_bytes = box * 128;
  const int thread = reread_thread() % kWarpgroupThreads, lane = thread % 32;
  const int row = thread / 32 * 16 + (lane & 15);
  if (thread / 32 * 16 < box) {  // a warp without rows computes with whatever it has
#pragma unroll
    for (int step = 0; step < kQueryStepsInRegisters; ++step) {
      load_matrix_x4(fragments[step], latent + step / 16 * kQueryHalfBytes +
                                          step / 4 % 4 * chunk_bytes +
                                          swizzled_offset(row, step % 4 * 2 + lane / 16));
    }
  }
  const int copied_row = thread % 64, half = thread / 64;
  store_shared(smem_address(query_step[half][copied_row]),
               load_shared(latent + kQueryHalfBytes + 3 * chunk_bytes +
                           swizzled_offset(copied_row, 6 + half)));
  if constexpr (kRope) {
#pragma unroll
    for (int i = 0; i < 64 * 128; i += kWarpgroupThreads * 16) {
      if (i >= chunk_bytes) break;
      store_shared(query_rope + i + thread * 16, load_shared(rope + i + thread * 16));
    }
  }
  fence_async_proxy();
  named_barrier_sync(barrier, kWarpgroupThreads);
}

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
