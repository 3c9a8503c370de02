// What a thread block has to do: its rows, its part's pieces, and the stream of loads they need.
#pragma once

#include "../common/smem_desc.cuh"
#include "config.h"

namespace flashmla::sm90 {

// The up to 64 query rows of a sequence that this block computes: neighbours in [s_q, h_q]. With
// one KV head the rows of all query tokens are packed; with several, a tile holds one query
// token's.
struct RowTile {
  int first;  // row within [s_q, h_q]
  int count;

  __device__ void find(const KernelArgs& args) {
    const int tile = blockIdx.x;
    if (args.group == args.h_q) {
      first = tile * kTileRows;
      count = min(args.rows - first, kTileRows);
    } else {
      const int tiles_per_query = (args.group + kTileRows - 1) / kTileRows;
      const int head = tile % tiles_per_query * kTileRows;
      first = tile / tiles_per_query * args.h_q + blockIdx.y * args.group + head;
      count = min(args.group - head, kTileRows);
    }
  }
};

// Cut `index`, made safe against schedules with foreign contents.
__device__ __forceinline__ Cut load_cut(const KernelArgs& args, int index) {
  const int2 raw = reinterpret_cast<const int2*>(args.cuts)[index];
  if (raw.x >= args.b) return {args.b, 0};
  return {max(raw.x, 0), max(raw.y, 0)};
}

__device__ __forceinline__ int clamp_seqlen(const KernelArgs& args, int seqlen) {
  return min(max(seqlen, 0), args.max_tokens);
}

__device__ __forceinline__ int load_seqlen(const KernelArgs& args, int sequence) {
  return clamp_seqlen(args, args.cache_seqlens[sequence]);
}

// The slot of a load in the ring, and the parity of the ring's current round.
struct RingIndex {
  int slot = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    if (++slot == kStages) {
      slot = 0;
      parity ^= 1;
    }
  }
};

enum LoadKind { kNothing, kQueries, kTile };

struct LoadItem {
  LoadKind kind;
  int index[kMaxBoxes];  // the queries' sequence, or the cache blocks that the tile spans
  int token_group;       // the eight tokens of the first block with which the tile begins
};

// The loads of a part in order: for each piece its queries, then its tiles. Kept in shared memory
// by the one thread that uses it (the value warpgroups have no registers to spare), with what comes
// next on its way there from global memory.
struct LoadStream {
  Cut end;
  int sequence, tile, tile_end;
  bool open;        // not past the part's end
  bool query_next;  // the queries of `sequence` come next, else its `tile`
  bool entered;     // tile_end is known
  // Of `sequence` and `tile`, copied asynchronously.
  int seqlen, blocks[kMaxBoxes];

  template <int kBoxes>
  __device__ void start(const KernelArgs& args, Cut begin, Cut end_cut) {
    end = end_cut;
    enter<kBoxes>(args, begin.sequence, begin.tile, owns_work(begin, end, begin.sequence));
  }

  // Moves on to the next load.
  template <int kBoxes>
  __device__ void next(const KernelArgs& args, volatile LoadItem& item) {
    item.kind = kNothing;
    if (!open) return;
    if (!query_next) {
      asm volatile("cp.async.wait_all;" ::: "memory");
      if (!entered) {
        const int tiles = num_tiles(clamp_seqlen(args, *const_cast<volatile int*>(&seqlen)));
        tile_end = sequence == end.sequence ? min(end.tile, tiles) : tiles;
        entered = true;
        if (tile >= tile_end) {
          enter_next<kBoxes>(args);
          if (!open) return;
        }
      }
    }
    if (query_next) {
      item.kind = kQueries;
      item.index[0] = sequence;
      query_next = false;
    } else {
      item.kind = kTile;
#pragma unroll
      for (int box = 0; box < kBoxes; ++box) {
        item.index[box] = *const_cast<volatile int*>(&blocks[box]);
      }
      item.token_group = (tile & ((1 << args.block_shift) - 1)) * (kTileTokens / kTokenGroup);
      if (++tile < tile_end)
        fetch_blocks<kBoxes>(args);
      else
        enter_next<kBoxes>(args);
    }
  }

 private:
  template <int kBoxes>
  __device__ void enter_next(const KernelArgs& args) {
    enter<kBoxes>(args, sequence + 1, 0, owns_work({0, 0}, end, sequence + 1));
  }

  template <int kBoxes>
  __device__ void enter(const KernelArgs& args, int next_sequence, int first_tile, bool owned) {
    open = owned;
    sequence = next_sequence;
    tile = first_tile;
    query_next = true;
    entered = false;
    if (!owned || args.max_blocks == 0) return;
    copy_async(&seqlen, args.cache_seqlens + sequence);
    fetch_blocks<kBoxes>(args);
  }

  template <int kBoxes>
  __device__ void fetch_blocks(const KernelArgs& args) {
    const int32_t* row = args.block_table + int64_t{sequence} * args.max_blocks;
#pragma unroll
    for (int box = 0; box < kBoxes; ++box) {
      const int entry = kBoxes > 1 ? tile * kBoxes + box : tile >> args.block_shift;
      copy_async(&blocks[box], row + min(entry, args.max_blocks - 1));
    }
  }

  static __device__ void copy_async(int* target, const int32_t* source) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(smem_address(target)), "l"(source)
                 : "memory");
  }
};

}  // namespace flashmla::sm90
