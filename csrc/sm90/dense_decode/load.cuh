// Loads by TMA, issued by one thread into a ring of tiles. A piece's queries take the same way as
// its cache tiles.
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
  const bool query = item.kind == kQueries;
  const int rows = query ? args.query_box : kTileTokens;
  mbarrier_arrive_expect(full, rows * kChunkRowBytes * (columns == 2 ? 1 : kHalfChunks));
  const CUtensorMap* map = columns == 2 ? (query ? &args.query_rope_map : &args.cache_rope_map)
                                        : (query ? &args.query_half_map : &args.cache_half_map);
  const int index = item.index;
  tma_load_4d(target, map, full, 0, query ? index * args.rows + smem.row_tile.first : item.token,
              columns * kHalfChunks + (query ? 0 : blockIdx.y * kChunks), query ? 0 : index,
              args.cache_hint);
}

// Loads the item that was found last into a slot that nobody uses any more.
__device__ __forceinline__ void load_item(const KernelArgs& args, SharedStorage& smem, int slot) {
  const volatile LoadItem& item = smem.item;
  if (item.kind == kNothing) return;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    load_columns(args, smem, item, smem_address(smem.latent[slot][half]),
                 smem_address(&smem.half_full[half][slot]), half);
  }
  load_columns(args, smem, item, smem_address(smem.rope[slot]), smem_address(&smem.rope_full[slot]),
               2);
}

__device__ __forceinline__ void find_item(const KernelArgs& args, SharedStorage& smem) {
  smem.stream.next(args, smem.item);
}

__device__ __forceinline__ void start_loads(const KernelArgs& args, SharedStorage& smem) {
  smem.stream.start(args, smem.begin, smem.end);
#pragma unroll 1
  for (int slot = 0; slot < kStages; ++slot) {
    find_item(args, smem);
    load_item(args, smem, slot);
  }
}

// Refills the slot of a load once all are through with it.
__device__ __forceinline__ void refill(const KernelArgs& args, SharedStorage& smem,
                                       RingIndex ring) {
  mbarrier_wait(smem_address(&smem.load_done[ring.slot]), ring.parity);
  load_item(args, smem, ring.slot);
}

}  // namespace flashmla::sm90
