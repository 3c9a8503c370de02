// Loads by TMA: a tile of the cache, or the queries of a row tile. kBoxes: cache blocks that a tile
// spans.
#pragma once

#include "sm90/dense_decode/config.h"
#include "sm90/ptx/barrier.cuh"
#include "sm90/ptx/smem_desc.cuh"
#include "sm90/ptx/tma.cuh"

namespace flashmla::sm90::dense_decode {

enum LoadKind { kNothing, kQueries, kTile };

struct LoadItem {
  LoadKind kind;
  int index[kMaxBoxes];  // the queries' sequence, or the cache blocks that the tile spans
  int token_group;       // the eight tokens of the first block with which the tile begins
};

// The entry of the block table for a box of a tile. max_blocks is not 0.
template <int kBoxes>
__device__ __forceinline__ int table_entry(const KernelArgs& args, int tile, int box) {
  const int entry = kBoxes > 1 ? tile * kBoxes + box : tile >> args.block_shift;
  return min(entry, args.max_blocks - 1);
}

__device__ __forceinline__ int first_token_group(const KernelArgs& args, int tile) {
  return (tile & ((1 << args.block_shift) - 1)) * (kTileTokens / kTokenGroup);
}

// Loads one part of an item's columns. first_row: the tile's first query row within its sequence.
template <int kBoxes, typename Item>
__device__ __forceinline__ void load_columns(const KernelArgs& args, int first_row,
                                             const Item& item, uint32_t target, uint32_t full,
                                             Part part) {
  const bool query = item.kind == kQueries, rope = part == Part::kRope;
  const int rows = query ? args.query_box : kTileTokens;
  const int row_bytes = kChunkRowBytes * (rope ? 1 : kHalfChunks);
  mbarrier_arrive_expect(full, rows * row_bytes);
  const CUtensorMap* map = rope ? (query ? &args.query_rope_map : &args.cache_rope_map)
                                : (query ? &args.query_half_map : &args.cache_half_map);
  const int index = item.index[0];
  const int chunk = static_cast<int>(part) * kHalfChunks + (query ? 0 : blockIdx.y * kChunks);
  tma_load_5d(target, map, full, 0, query ? index * args.rows + first_row : 0, chunk,
              query ? 0 : item.token_group, query ? 0 : index, args.cache_hint);
  if (query) return;
#pragma unroll
  for (int box = 1; box < kBoxes; ++box) {
    tma_load_5d(target + kTileTokens / kBoxes * box * row_bytes, map, full, 0, 0, chunk, 0,
                item.index[box], args.cache_hint);
  }
}

}  // namespace flashmla::sm90::dense_decode
