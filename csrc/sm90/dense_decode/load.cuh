// Loads of cache tiles, issued by one thread: the ring of latent tiles and the pair of rope tiles.
#pragma once

#include "../common/barrier.cuh"
#include "../common/tma.cuh"
#include "shared_storage.cuh"

namespace flashmla::sm90 {

__device__ __forceinline__ void load_half(const KernelArgs& args, SharedStorage& smem, int half,
                                          int slot, int block) {
  const uint32_t full = smem_address(&smem.latent_full[half][slot]);
  mbarrier_arrive_expect(full, kHalfBytes);
  tma_load_4d(smem_address(smem.latent[slot][half]), &args.half_map, full, 0, 0,
              blockIdx.y * kChunks + half * kHalfChunks, block, kEvictFirst);
}

__device__ __forceinline__ void load_rope(const KernelArgs& args, SharedStorage& smem, int slot,
                                          int block) {
  const uint32_t full = smem_address(&smem.rope_full[slot]);
  mbarrier_arrive_expect(full, kChunkBytes);
  tma_load_4d(smem_address(smem.rope[slot]), &args.rope_map, full, 0, 0,
              blockIdx.y * kChunks + kChunks - 1, block, kEvictFirst);
}

// Loads the part's next latent tile into `slot`, and its rope columns into L2: there is no room for
// them yet.
__device__ __forceinline__ void load_latent(const KernelArgs& args, SharedStorage& smem, int slot) {
  smem.rope_pending = !smem.stream.done;
  if (smem.stream.done) return;
  const int block = smem.stream.next(args);
  load_half(args, smem, 0, slot, block);
  load_half(args, smem, 1, slot, block);
  tma_prefetch_4d(&args.rope_map, 0, 0, blockIdx.y * kChunks + kChunks - 1, block, kEvictFirst);
  smem.rope_block = block;
}

__device__ __forceinline__ void load_pending_rope(const KernelArgs& args, SharedStorage& smem,
                                                  int slot) {
  if (smem.rope_pending) load_rope(args, smem, slot, smem.rope_block);
}

// Tiles 0, 1 and 2, without the rope columns of tile 2.
__device__ __forceinline__ void start_loads(const KernelArgs& args, SharedStorage& smem, Cut begin,
                                            Cut end) {
  smem.stream.open(args, begin, end);
#pragma unroll 1
  for (int slot = 0; slot < kStages; ++slot) {
    load_latent(args, smem, slot);
    if (slot < 2) load_pending_rope(args, smem, slot);
  }
}

// Once tile t is through: the rope columns of tile t + 2, wanted soonest and so first in the copy
// engine's queue, then the latent columns of tile t + 3. `stage` and `pair` are tile t's slots.
__device__ __forceinline__ void load_more(const KernelArgs& args, SharedStorage& smem, int stage,
                                          int pair) {
  load_pending_rope(args, smem, pair);
  load_latent(args, smem, stage);
}

}  // namespace flashmla::sm90
