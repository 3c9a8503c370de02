// What a thread block has to do: its part's pieces, and the stream of cache tiles that they need.
#pragma once

#include "../common/smem_desc.cuh"
#include "config.h"

namespace flashmla::sm90 {

// Cut `index`, made safe against schedules with foreign contents.
__device__ __forceinline__ Cut load_cut(const KernelArgs& args, int index) {
  const int2 raw = reinterpret_cast<const int2*>(args.cuts)[index];
  if (raw.x >= args.b) return {args.b, 0};
  return {max(raw.x, 0), max(raw.y, 0)};
}

__device__ __forceinline__ int load_seqlen(const KernelArgs& args, int sequence) {
  return min(max(args.cache_seqlens[sequence], 0), args.max_blocks * kBlockSize);
}

// Yields the cache block ids of all tiles of a part in order, one fetched ahead of its use. Kept in
// shared memory by the one thread that uses it: the value warpgroups have no registers to spare.
struct TileStream {
  Cut end;
  int sequence, tile, tile_end;
  int block;  // id of the next tile, on its way from global memory
  bool done;

  __device__ void open(const KernelArgs& args, Cut begin, Cut end_cut) {
    end = end_cut;
    sequence = begin.sequence;
    tile = tile_end = 0;
    done = false;
    if (owns_work(begin, end, sequence)) {
      const Piece piece = piece_of(begin, end, sequence, load_seqlen(args, sequence));
      tile = piece.tile_begin;
      tile_end = piece.tile_end;
    }
    fetch(args);
  }

  // The next tile's block id; moves on. Not to be called once done.
  __device__ int next(const KernelArgs& args) {
    asm volatile("cp.async.wait_all;" ::: "memory");
    const int id = *const_cast<volatile int*>(&block);
    fetch(args);
    return id;
  }

 private:
  __device__ void fetch(const KernelArgs& args) {
    while (tile >= tile_end) {
      ++sequence;
      if (!owns_work({0, 0}, end, sequence)) {
        done = true;
        return;
      }
      tile = 0;
      tile_end = piece_of({0, 0}, end, sequence, load_seqlen(args, sequence)).tile_end;
    }
    const int* id = args.block_table + (int64_t{sequence} * args.max_blocks + tile++);
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(smem_address(&block)), "l"(id)
                 : "memory");
  }
};

// Position in a ring of kDepth slots, and the parity of its current round.
template <int kDepth>
struct RingIndex {
  int slot = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    if (++slot == kDepth) {
      slot = 0;
      parity ^= 1;
    }
  }
};

// Packed row `row` of KV head `kv_head` within [s_q, h_q]; -1 past the end.
__device__ __forceinline__ int row_offset(const KernelArgs& args, int kv_head, int row) {
  const int query = row / args.group;
  if (query >= args.s_q) return -1;
  return query * args.h_q + kv_head * args.group + row % args.group;
}

}  // namespace flashmla::sm90
