// The query tile: seven chunks as wgmma A fragments in registers, two resident in shared memory.
#pragma once

#include "../common/barrier.cuh"
#include "../common/matrix.cuh"
#include "../common/smem_desc.cuh"
#include "shared_storage.cuh"

namespace flashmla::sm90 {

using QueryFragments = uint32_t[kQueryChunksInRegisters][4][4];  // chunk, k16 step, A fragment

__device__ __forceinline__ void copy_chunk(uint32_t target, uint32_t source, int thread) {
#pragma unroll
  for (int i = 0; i < kChunkBytes; i += kWarpgroupThreads * 16) {
    const uint32_t offset = i + thread * 16;
    store_shared(target + offset, load_shared(source + offset));
  }
}

// Takes the queries out of the ring. Called by the score warpgroup with no wgmma in flight;
// `barrier` is its named barrier.
__device__ __forceinline__ void take_query(SharedStorage& smem, RingIndex<kStages> stage,
                                           RingIndex<2> pair, int barrier,
                                           QueryFragments& fragments) {
  const int thread = threadIdx.x % kWarpgroupThreads, lane = thread % 32;
  const int row = thread / 32 * 16 + (lane & 15);
  const uint32_t latent = smem_address(smem.latent[stage.slot]);
  mbarrier_wait(smem_address(&smem.latent_full[0][stage.slot]), stage.parity);
  mbarrier_wait(smem_address(&smem.latent_full[1][stage.slot]), stage.parity);
#pragma unroll
  for (int c = 0; c < kQueryChunksInRegisters; ++c) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      load_matrix_x4(fragments[c][k],
                     latent + c * kChunkBytes + swizzled_offset(row, k * 2 + lane / 16));
    }
  }
  copy_chunk(smem_address(smem.query[0]), latent + kQueryChunksInRegisters * kChunkBytes, thread);
  mbarrier_wait(smem_address(&smem.rope_full[pair.slot]), pair.parity);
  copy_chunk(smem_address(smem.query[1]), smem_address(smem.rope[pair.slot]), thread);
  fence_async_proxy();
  named_barrier_sync(barrier, kWarpgroupThreads);
}

}  // namespace flashmla::sm90
