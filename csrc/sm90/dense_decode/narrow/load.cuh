// The narrow kernel's loading thread: for each piece its queries, then its tiles, into the ring.
#pragma once

#include "sm90/dense_decode/narrow/shared_storage.cuh"

namespace flashmla::sm90::dense_decode::narrow {

// Loads an item once its slot is free.
template <int kRows, int kBoxes>
__device__ __forceinline__ void load_item(const KernelArgs& args, SharedStorage<kRows>& smem,
                                          const LoadItem& item, Ring& ring) {
  // The slot's last round must be over; in the first this passes at once.
  mbarrier_wait(smem_address(&smem.load_done[ring.slot]), ring.parity ^ 1);
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    const Part part{i};
    const bool rope = part == Part::kRope;
    load_columns<kBoxes>(
        args, smem.row_tile.first, item,
        rope ? smem_address(smem.rope[ring.slot]) : smem_address(smem.latent[ring.slot][i]),
        rope ? smem_address(&smem.rope_full[ring.slot])
             : smem_address(&smem.half_full[i][ring.slot]),
        part);
  }
  ring.advance();
}

template <int kBoxes>
__device__ __forceinline__ void read_table(const KernelArgs& args, int sequence, int tile,
                                           int (&blocks)[kMaxBoxes]) {
  const int32_t* row = args.block_table + int64_t{sequence} * args.max_blocks;
#pragma unroll
  for (int box = 0; box < kBoxes; ++box) blocks[box] = row[table_entry<kBoxes>(args, tile, box)];
}

template <int kRows, int kBoxes>
__device__ void run_loads(const KernelArgs& args, SharedStorage<kRows>& smem, Cut begin, Cut end) {
  Ring ring;
  for (int sequence = begin.sequence; owns_work(begin, end, sequence); ++sequence) {
    // The first tile's ids are on their way while the queries' load is issued, later ones while a
    // slot is awaited.
    int next[kMaxBoxes] = {};
    if (args.max_blocks > 0) {
      read_table<kBoxes>(args, sequence, sequence == begin.sequence ? begin.tile : 0, next);
    }
    const int length = args.cache_seqlens[sequence];
    load_item<kRows, kBoxes>(args, smem, {.kind = kQueries, .index = {sequence}, .token_group = 0},
                             ring);
    const Piece piece = piece_of(begin, end, sequence, args.clamp_seqlen(length));
    for (int tile = piece.tile_begin; tile < piece.tile_end; ++tile) {
      LoadItem item{.kind = kTile, .index = {}, .token_group = first_token_group(args, tile)};
#pragma unroll
      for (int box = 0; box < kBoxes; ++box) item.index[box] = next[box];
      if (tile + 1 < piece.tile_end) read_table<kBoxes>(args, sequence, tile + 1, next);
      load_item<kRows, kBoxes>(args, smem, item, ring);
    }
  }
}

}  // namespace flashmla::sm90::dense_decode::narrow
