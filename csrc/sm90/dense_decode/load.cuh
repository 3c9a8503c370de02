// Loads by TMA, issued by one thread into a ring of tiles. A piece's queries take the same way as
// its cache tiles. kBoxes: cache blocks that a tile spans.
//
// The thread belongs to a value warpgroup, whose products must not wait for it. So what takes time,
// to find the next load, is done while the tensor cores are at work.
#pragma once

#include "../common/barrier.cuh"
#include "../common/tma.cuh"
#include "shared_storage.cuh"

namespace flashmla::sm90 {

// Loads columns of an item: 0 left half, 1 right half, 2 rope.
template <int kBoxes>
__device__ __forceinline__ void load_columns(const KernelArgs& args, const SharedStorage& smem,
                                             const volatile LoadItem& item, uint32_t target,
                                             uint32_t full, int columns) {
  const bool query = item.kind == kQueries;
  const int rows = query ? args.query_box : kTileTokens;
  const int row_bytes = kChunkRowBytes * (columns == 2 ? 1 : kHalfChunks);
  mbarrier_arrive_expect(full, rows * row_bytes);
  const CUtensorMap* map = columns == 2 ? (query ? &args.query_rope_map : &args.cache_rope_map)
                                        : (query ? &args.query_half_map : &args.cache_half_map);
  const int index = item.index[0];
  const int chunk = columns * kHalfChunks + (query ? 0 : blockIdx.y * kChunks);
  tma_load_5d(target, map, full, 0, query ? index * args.rows + smem.row_tile.first : 0, chunk,
              query ? 0 : item.token_group, query ? 0 : index, args.cache_hint);
  if (query) return;
#pragma unroll
  for (int box = 1; box < kBoxes; ++box) {
    tma_load_5d(target + kTileTokens / kBoxes * box * row_bytes, map, full, 0, 0, chunk, 0,
                item.index[box], args.cache_hint);
  }
}

// Loads the item that was found last into a slot that nobody uses any more.
template <int kBoxes>
__device__ __forceinline__ void load_item(const KernelArgs& args, SharedStorage& smem, int slot) {
  const volatile LoadItem& item = smem.item;
  if (item.kind == kNothing) return;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    load_columns<kBoxes>(args, smem, item, smem_address(smem.latent[slot][half]),
                         smem_address(&smem.half_full[half][slot]), half);
  }
  load_columns<kBoxes>(args, smem, item, smem_address(smem.rope[slot]),
                       smem_address(&smem.rope_full[slot]), 2);
}

template <int kBoxes>
__device__ __forceinline__ void find_item(const KernelArgs& args, SharedStorage& smem) {
  smem.stream.next<kBoxes>(args, smem.item);
}

template <int kBoxes>
__device__ __forceinline__ void fill_slot(const KernelArgs& args, SharedStorage& smem, int slot) {
  find_item<kBoxes>(args, smem);
  load_item<kBoxes>(args, smem, slot);
}

// The first loads: a piece's queries, and usually its first tile. The last slot is left to the
// loading thread's role: the other roles need not wait for that.
template <int kBoxes>
__device__ __forceinline__ void start_loads(const KernelArgs& args, SharedStorage& smem) {
  smem.stream.start<kBoxes>(args, smem.begin, smem.end);
#pragma unroll 1
  for (int slot = 0; slot < kStages - 1; ++slot) {
    fill_slot<kBoxes>(args, smem, slot);
  }
}

// Refills the slot of a load once all are through with it.
template <int kBoxes>
__device__ __forceinline__ void refill(const KernelArgs& args, SharedStorage& smem,
                                       RingIndex ring) {
  mbarrier_wait(smem_address(&smem.load_done[ring.slot]), ring.parity);
  load_item<kBoxes>(args, smem, ring.slot);
}

}  // namespace flashmla::sm90
