// Loads by TMA, issued by one thread: a ring of latent columns and a pair of rope columns. A piece's
// queries take the same way as its cache tiles.
#pragma once

#include "../common/barrier.cuh"
#include "../common/tma.cuh"
#include "shared_storage.cuh"

namespace flashmla::sm90 {

// Loads columns of the current item: 0 left half, 1 right half, 2 rope.
__device__ __forceinline__ void load_columns(const KernelArgs& args, const SharedStorage& smem,
                                             uint32_t target, uint32_t full, int columns) {
  mbarrier_arrive_expect(full, columns == 2 ? kChunkBytes : kHalfBytes);
  const int chunk = columns * kHalfChunks;
  if (smem.load.kind == kQueries) {
    const CUtensorMap* map = columns == 2 ? &args.query_rope_map : &args.query_half_map;
    const int row = smem.load.index * args.rows + smem.row_tile.first;
    tma_load_4d(target, map, full, 0, row, chunk, 0, kEvictFirst);
  } else {
    const CUtensorMap* map = columns == 2 ? &args.cache_rope_map : &args.cache_half_map;
    tma_load_4d(target, map, full, 0, 0, blockIdx.y * kChunks + chunk, smem.load.index, kEvictFirst);
  }
}

// Takes the stream's next item and loads it into `slot`, but for its rope columns: these go to L2, as
// there is no room for them in shared memory yet.
__device__ __forceinline__ void load_latent(const KernelArgs& args, SharedStorage& smem, int slot) {
  smem.stream.next(args, smem.load);
  if (smem.load.kind == kNothing) return;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    load_columns(args, smem, smem_address(smem.latent[slot][half]),
                 smem_address(&smem.latent_full[half][slot]), half);
  }
  if (smem.load.kind == kTile) {
    tma_prefetch_4d(&args.cache_rope_map, 0, 0, blockIdx.y * kChunks + kChunks - 1, smem.load.index,
                    kEvictFirst);
  }
}

// The rope columns of the item that load_latent() took last.
__device__ __forceinline__ void load_rope(const KernelArgs& args, SharedStorage& smem, int slot) {
  if (smem.load.kind == kNothing) return;
  load_columns(args, smem, smem_address(smem.rope[slot]), smem_address(&smem.rope_full[slot]), 2);
}

// Loads 0, 1 and 2, without the rope columns of the last.
__device__ __forceinline__ void start_loads(const KernelArgs& args, SharedStorage& smem) {
  smem.stream.start(args, smem.begin, smem.end);
#pragma unroll 1
  for (int slot = 0; slot < kStages; ++slot) {
    load_latent(args, smem, slot);
    if (slot < 2) load_rope(args, smem, slot);
  }
}

// Once load t is used up: the rope columns of load t + 2, wanted soonest and so first in the copy
// engine's queue, then the latent columns of load t + 3. `stage` and `pair` are load t's slots.
__device__ __forceinline__ void load_more(const KernelArgs& args, SharedStorage& smem,
                                          RingIndex<kStages> stage, RingIndex<2> pair) {
  mbarrier_wait(smem_address(&smem.load_done[pair.slot]), pair.parity);
  load_rope(args, smem, pair.slot);
  load_latent(args, smem, stage.slot);
}

}  // namespace flashmla::sm90
