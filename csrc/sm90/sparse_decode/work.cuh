// What a thread block has to do: its heads, and its part's pieces.
#pragma once

#include "sm90/ptx/thread.cuh"
#include "sm90/sparse_decode/config.h"

namespace flashmla::sm90::sparse {

// The up to kRows heads that this block computes.
struct HeadTile {
  int first, count;

  template <int kRows>
  static __device__ __forceinline__ HeadTile of_block(const KernelArgs& args) {
    const int first = blockIdx.x * kRows;
    return {first, min(args.h_q - first, kRows)};
  }
};

// Indices of a query token that count.
__device__ __forceinline__ int load_length(const SourceArgs& source, int query) {
  if (source.topk_length == nullptr) return source.topk;
  return min(max(source.topk_length[query], 0), source.topk);
}

// A query token's tiles: the main cache's, then the extra one's.
struct QueryTiles {
  int main_length, extra_length, main, all;

  static __device__ __forceinline__ QueryTiles of(const sparse::KernelArgs& args, int query) {
    QueryTiles tiles;
    tiles.main_length = load_length(args.main, query);
    tiles.extra_length = args.extra.blocks != nullptr ? load_length(args.extra, query) : 0;
    tiles.main = num_tiles(tiles.main_length);
    tiles.all = tiles.main + num_tiles(tiles.extra_length);
    return tiles;
  }
};

// The first block of the layer, wherever `first_block` points.
__device__ __forceinline__ const uint8_t* find_layer(const SourceArgs& source) {
  if (source.first_block == nullptr) return source.blocks;
  const int64_t first = min(max(int64_t{*source.first_block}, int64_t{0}), source.last_first_block);
  return source.blocks + first * source.block_bytes;
}

}  // namespace flashmla::sm90::sparse
