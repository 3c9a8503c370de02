// Loads, issued by one thread into a ring of tiles. A piece's queries take the same way as its
// cache tiles.
//
// The thread belongs to a value warpgroup, whose products must not wait for it. So what takes time,
// to find the next load, is done while the tensor cores are at work.
#pragma once

#include "sm90/dense_decode/wide/shared_storage.cuh"

namespace flashmla::sm90::dense_decode::wide {

// Loads an item into a slot that nobody uses any more.
template <int kBoxes, typename Item>
__device__ __forceinline__ void load_item(const KernelArgs& args, SharedStorage& smem,
                                          const Item& item, int slot) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    load_columns<kBoxes>(args, smem.row_tile.first, item, smem_address(smem.latent[slot][half]),
                         smem_address(&smem.half_full[half][slot]), Part{half});
  }
  load_columns<kBoxes>(args, smem.row_tile.first, item, smem_address(smem.rope[slot]),
                       smem_address(&smem.rope_full[slot]), Part::kRope);
}

// Loads the item that was found last, if there is one.
template <int kBoxes>
__device__ __forceinline__ void load_found(const KernelArgs& args, SharedStorage& smem, int slot) {
  if (smem.item.kind != kNothing) load_item<kBoxes>(args, smem, smem.item, slot);
}

template <int kBoxes>
__device__ __forceinline__ void find_item(const KernelArgs& args, SharedStorage& smem) {
  smem.stream.next<kBoxes>(args, smem.item);
}

template <int kBoxes>
__device__ __forceinline__ void fill_slot(const KernelArgs& args, SharedStorage& smem, int slot) {
  find_item<kBoxes>(args, smem);
  load_found<kBoxes>(args, smem, slot);
}

// The first loads: a piece's queries, and usually its first tile. The last slot is left to the
// loading thread's role: the other roles need not wait for that.
template <int kBoxes>
__device__ __forceinline__ void start_loads(const KernelArgs& args, SharedStorage& smem) {
  smem.stream.start<kBoxes>(args, smem.begin, smem.end);
  if (smem.stream.open) {  // the queries, without the way through the loader's state
    const LoadItem queries{.kind = kQueries, .index = {smem.begin.sequence}, .token_group = 0};
    load_item<kBoxes>(args, smem, queries, 0);
    smem.stream.query_next = false;
  }
  fill_slot<kBoxes>(args, smem, 1);
}

// Refills the slot of a load once all are through with it.
template <int kBoxes>
__device__ __forceinline__ void refill(const KernelArgs& args, SharedStorage& smem, Ring ring) {
  mbarrier_wait(smem_address(&smem.load_done[ring.slot]), ring.parity);
  load_found<kBoxes>(args, smem, ring.slot);
}

}  // namespace flashmla::sm90::dense_decode::wide
