// What a thread block has to do, item by item.
#pragma once

#include "sm90/attention/work.cuh"
#include "sm90/index_scores/shared_storage.cuh"

namespace flashmla::sm90::index_scores {

// Few query tokens: the block has those of its column of the grid, (query tiles, parts), and the
// tiles between its part's cuts. Many: blocks take (query tile, chunk of a sequence's tiles) in
// turn, those that read the same keys at about the same time.
template <int kQueries, int kBlocks>
struct Work {
  const KernelArgs& args;
  Cut begin, end;
  int sequence;
  // Of the first sequence, so that what is read first is read at once: its length, and a lane's of
  // the part's first 32 tiles' blocks.
  int first_length, first_blocks;
  int64_t next_unit;

  __device__ explicit Work(const KernelArgs& args) : args(args) {
    if (args.chunk_tiles == 0) {
      begin = load_cut(args.cuts, blockIdx.y, args.b);
      end = load_cut(args.cuts, blockIdx.y + 1, args.b);
      sequence = begin.sequence;
      load_first();
    } else {
      next_unit = blockIdx.x;
    }
  }

  __device__ void load_first() {
    const int lane = threadIdx.x % 32;
    const bool exists = sequence < args.b;
    first_length = exists ? args.cache_seqlens[sequence] : 0;
    first_blocks = exists && lane < args.max_blocks - begin.tile
                       ? load_block(sequence, begin.tile + lane)
                       : -1;
  }

  __device__ int load_block(int sequence, int tile) const {
    return args.block_table[int64_t{sequence} * args.max_blocks + tile];
  }

  // A lane's of 32 tiles' blocks, from one of the item's on.
  __device__ int load_blocks(const Item& item, int tile) const {
    const int lane = threadIdx.x % 32;
    const bool known = args.chunk_tiles == 0 && item.sequence == begin.sequence &&
                       item.tile_end - begin.tile <= 32;
    if (known) return __shfl_sync(~0u, first_blocks, tile - begin.tile + lane);
    return tile + lane < item.tile_end ? load_block(item.sequence, tile + lane) : -1;
  }

  // The tiles that some query of the item sees, at most those given.
  __device__ Item make(int sequence, int query_tile, int length, int tile_begin, int tile_end) {
    const int first = query_tile * kQueries, count = min(args.queries - first, kQueries);
    const int query = args.first_query + first;
    const int seen = args.seen_tokens(length, query + count - 1);
    return {.sequence = sequence,
            .first_query = query,
            .queries = count,
            .seen = args.seen_tokens(length, query),
            .tile_begin = tile_begin,
            .tile_end = min(tile_end, num_tiles(seen))};
  }

  // Of the blocks that have the same part each takes a run of every item's tiles.
  __device__ void share(Item& item) const {
    const int rank = blockIdx.z;
    const int begin = item.tile_begin, count = max(item.tile_end - begin, 0);
    item.tile_begin = begin + (count * rank + kBlocks - 1) / kBlocks;
    item.tile_end = begin + (count * (rank + 1) + kBlocks - 1) / kBlocks;
  }

  __device__ Item next() { return args.chunk_tiles == 0 ? next_piece() : next_chunk(); }

  __device__ Item next_piece() {
    for (; owns_work(begin, end, sequence); ++sequence) {
      const bool is_first = sequence == begin.sequence;
      const int length = args.clamp_length(is_first ? first_length : args.cache_seqlens[sequence]);
      const Piece piece = piece_of(begin, end, sequence, length);
      Item item = make(sequence, blockIdx.x, length, piece.tile_begin, piece.tile_end);
      if constexpr (kBlocks > 1) share(item);
      if (item.tile_begin < item.tile_end) {
        ++sequence;
        return item;
      }
    }
    return {.sequence = -1};
  }

  __device__ Item next_chunk() {
    const int query_tiles = (args.queries + kQueries - 1) / kQueries;
    const int chunks = (args.max_blocks + args.chunk_tiles - 1) / args.chunk_tiles;
    for (;;) {
      const int64_t query_keys = next_unit / query_tiles;
      const int query_tile = next_unit % query_tiles;
      const int sequence = query_keys / chunks, chunk = query_keys % chunks;
      if (query_keys >= int64_t{args.b} * chunks) return {.sequence = -1};
      next_unit += gridDim.x;
      const int length = args.clamp_length(args.cache_seqlens[sequence]);
      const Item item = make(sequence, query_tile, length, chunk * args.chunk_tiles,
                             (chunk + 1) * args.chunk_tiles);
      if (item.tile_begin < item.tile_end) return item;
    }
  }
};

}  // namespace flashmla::sm90::index_scores
