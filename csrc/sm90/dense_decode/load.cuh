// Loads by TMA, issued by one thread: a ring of latent columns and a pair of rope columns. A
// piece's queries take the same way as its cache tiles.
//
// The thread belongs to a value warpgroup, whose products must not wait for it. So what takes time,
// to find the next load, is done while the tensor cores are at work.
#pragma once

#include "../common/barrier.cuh"
#include "../common/tma.cuh"
#include "shared_storage.cuh"

namespace flashmla::sm90 {

// Loads columns of an item: 0 left half, 1 right half, 2 rope.
__device__ __forceinline__ void load_columns(const KernelArgs& args, const SharedStorage& smem,
                                             const volatile LoadItem& item, uint32_t target,
                                             uint32_t full, int columns) {
  mbarrier_arrive_expect(full, columns == 2 ? kChunkBytes : kHalfBytes);
  const bool query = item.kind == kQueries;
  const CUtensorMap* map = columns == 2 ? (query ? &args.query_rope_map : &args.cache_rope_map)
                                        : (query ? &args.query_half_map : &args.cache_half_map);
  const int index = item.index;
  tma_load_4d(target, map, full, 0, query ? index * args.rows + smem.row_tile.first : 0,
              columns * kHalfChunks + (query ? 0 : blockIdx.y * kChunks), query ? 0 : index,
              args.cache_hint);
}

__device__ __forceinline__ void load_latent(const KernelArgs& args, SharedStorage& smem,
                                            const volatile LoadItem& item, int slot) {
  if (item.kind == kNothing) return;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    load_columns(args, smem, item, smem_address(smem.latent[slot][half]),
                 smem_address(&smem.latent_full[half][slot]), half);
  }
}

__device__ __forceinline__ void load_rope(const KernelArgs& args, SharedStorage& smem,
                                          const volatile LoadItem& item, int slot) {
  if (item.kind == kNothing) return;
  load_columns(args, smem, item, smem_address(smem.rope[slot]), smem_address(&smem.rope_full[slot]),
               2);
}

// Loads 0, 1 and 2, without the rope columns of the last.
__device__ __forceinline__ void start_loads(const KernelArgs& args, SharedStorage& smem) {
  smem.stream.start(args, smem.begin, smem.end);
#pragma unroll 1
  for (int t = 0; t < kStages; ++t) {
    volatile LoadItem& item = smem.items[t % 2];
    smem.stream.next(args, item);
    load_latent(args, smem, item, t);
    if (t < 2) load_rope(args, smem, item, t);
  }
}

// During load t: finds load t + 3. Its rope columns will be wanted as soon as there is room for
// them: they are brought to L2.
__device__ __forceinline__ void prepare_load(const KernelArgs& args, SharedStorage& smem,
                                             RingIndex<2> pair) {
  volatile LoadItem& item = smem.items[pair.slot ^ 1];
  smem.stream.next(args, item);
  if (item.kind == kTile) {
    tma_prefetch_4d(&args.cache_rope_map, 0, 0, blockIdx.y * kChunks + kChunks - 1, item.index,
                    args.cache_hint);
  }
}

// Once load t is used up: the rope columns of load t + 2, wanted soonest and so first in the copy
// engine's queue, then the latent columns of load t + 3. `stage` and `pair` are load t's slots.
__device__ __forceinline__ void load_more(const KernelArgs& args, SharedStorage& smem,
                                          RingIndex<kStages> stage, RingIndex<2> pair) {
  mbarrier_wait(smem_address(&smem.load_done[pair.slot]), pair.parity);
  load_rope(args, smem, smem.items[pair.slot], pair.slot);
  load_latent(args, smem, smem.items[pair.slot ^ 1], stage.slot);
}

}  // namespace flashmla::sm90
