// What to load next.
#pragma once

#include "sm90/dense_decode/load.cuh"
#include "sm90/ptx/smem_desc.cuh"

namespace flashmla::sm90::dense_decode::wide {

// The loads of a part in order: for each piece its queries, then its tiles. Kept in shared memory
// by the one thread that uses it (the value warpgroups have no registers to spare), with what comes
// next on its way there from global memory.
struct LoadStream {
  Cut end;
  int sequence, tile, tile_end;
  bool open;              // not past the part's end
  bool query_next;        // the queries of `sequence` come next, else its `tile`
  bool entered;           // tile_end is known
  int seqlen;             // of `sequence`, copied asynchronously,
  int blocks[kMaxBoxes];  // and so are the ids of `tile`

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
        const int tiles = num_tiles(args.clamp_seqlen(*const_cast<volatile int*>(&seqlen)));
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
      item.token_group = first_token_group(args, tile);
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
      copy_async(&blocks[box], row + table_entry<kBoxes>(args, tile, box));
    }
  }

  static __device__ void copy_async(int* target, const int32_t* source) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(smem_address(target)), "l"(source)
                 : "memory");
  }
};

}  // namespace flashmla::sm90::dense_decode::wide
