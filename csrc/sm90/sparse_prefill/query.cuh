// A query token's heads: 496 latent columns as wgmma A fragments in registers,
// the last 16 and the rope columns in shared memory.
#pragma once

#include "sm90/attention/query_products.cuh"
#include "sm90/ptx/barrier.cuh"
#include "sm90/ptx/matrix.cuh"
#include "sm90/sparse_prefill/shared_storage.cuh"

namespace flashmla::sm90::sparse_prefill {

// Takes the heads out of the ring: chunks of `box` rows. Rows past the box are
// whatever is there; their results are not stored. Called by the score
// warpgroup with no wgmma in flight.
template <bool kRope>
__device__ __forceinline__ void take_query(SharedStorage& smem, Ring ring, int box,
                                           QueryFragments& fragments) {
  const int chunk_bytes = box * kChunkRowBytes;
  const int thread = reread_thread(), lane = thread % 32;
  const int row = thread / 32 * 16 + (lane & 15);
  const uint32_t latent = smem_address(smem.latent[ring.slot]);
  mbarrier_wait(smem_address(&smem.left_full[ring.slot]), ring.parity);
  mbarrier_wait(smem_address(&smem.right_full[ring.slot]), ring.parity);
  if (thread / 32 * 16 < box) {  // a warp without heads computes with whatever it has
#pragma unroll
    for (int step = 0; step < kQueryStepsInRegisters; ++step) {
      // The right half has a box of its own.
      const int half = step / (4 * kHalfChunks), chunk = step / 4 % kHalfChunks;
      load_matrix_x4(fragments[step], latent + half * kHalfBytes + chunk * chunk_bytes +
                                          swizzled_offset(row, step % 4 * 2 + lane / 16));
    }
  }
  const int copied_row = thread % kTileRows, half = thread / kTileRows;
  store_shared(smem_address(smem.query_step[half][copied_row]),
               load_shared(latent + kHalfBytes + (kHalfChunks - 1) * chunk_bytes +
                           swizzled_offset(copied_row, 6 + half)));
  if constexpr (kRope) {
#pragma unroll
    for (int i = 0; i < kChunkBytes; i += kWarpgroupThreads * 16) {
      if (i >= chunk_bytes) break;
      const uint32_t offset = i + thread * 16;
      store_shared(smem_address(smem.query_rope) + offset,
                   load_shared(smem_address(smem.rope[ring.slot]) + offset));
    }
  }
  fence_async_proxy();
  named_barrier_sync(kScoreBarrier, kWarpgroupThreads);
}

}  // namespace flashmla::sm90::sparse_prefill
