// The narrow kernel's loading thread: for each piece its queries, then its tiles, into the rings.
#pragma once

#include "shared_storage.cuh"

namespace flashmla::sm90::narrow {

template <int kRows, int kBoxes>
struct Loader {
  const KernelArgs& args;
  SharedStorage<kRows>& smem;
  Ring<kRows> ring = {};
  RingIndex<kStages<kRows>> before_last = {};
  int loads = 0;

  __device__ __forceinline__ void load(const LoadItem& item) {
    // With two stages the load before the last has left these columns' slot, with three it leaves
    // that of the next load's.
    if (kStages<kRows> == 2) wait_for_before_last();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      load_columns<kBoxes>(args, smem.row_tile.first, item,
                           smem_address(smem.latent[ring.latent.slot][half]),
                           smem_address(&smem.half_full[half][ring.latent.slot]), half);
    }
    if (kStages<kRows> > 2) wait_for_before_last();
    load_columns<kBoxes>(args, smem.row_tile.first, item, smem_address(smem.rope[ring.rope.slot]),
                         smem_address(&smem.rope_full[ring.rope.slot]), 2);
    ring.advance();
    ++loads;
  }

 private:
  __device__ __forceinline__ void wait_for_before_last() {
    static_assert(kRopeStages == 2);
    if (loads < 2) return;
    mbarrier_wait(smem_address(&smem.load_done[before_last.slot]), before_last.parity);
    before_last.advance();
  }
};

template <int kBoxes>
__device__ __forceinline__ void read_table(const KernelArgs& args, int sequence, int tile,
                                           int (&blocks)[kMaxBoxes]) {
  const int32_t* row = args.block_table + int64_t{sequence} * args.max_blocks;
#pragma unroll
  for (int box = 0; box < kBoxes; ++box) blocks[box] = row[table_entry<kBoxes>(args, tile, box)];
}

template <int kRows, int kBoxes>
__device__ void run_loads(const KernelArgs& args, SharedStorage<kRows>& smem, Cut begin, Cut end) {
  Loader<kRows, kBoxes> loader{args, smem};
  for (int sequence = begin.sequence; owns_work(begin, end, sequence); ++sequence) {
    // On their way while the queries' load is issued, and later ones while a slot is awaited.
    int next[kMaxBoxes] = {};
    if (args.max_blocks > 0) {
      read_table<kBoxes>(args, sequence, sequence == begin.sequence ? begin.tile : 0, next);
    }
    const int length = args.cache_seqlens[sequence];
    loader.load({.kind = kQueries, .index = {sequence}, .token_group = 0});
    const Piece piece = piece_of(begin, end, sequence, clamp_seqlen(args, length));
    for (int tile = piece.tile_begin; tile < piece.tile_end; ++tile) {
      LoadItem item{.kind = kTile, .index = {}, .token_group = first_token_group(args, tile)};
#pragma unroll
      for (int box = 0; box < kBoxes; ++box) item.index[box] = next[box];
      if (tile + 1 < piece.tile_end) read_table<kBoxes>(args, sequence, tile + 1, next);
      loader.load(item);
    }
  }
}

}  // namespace flashmla::sm90::narrow
