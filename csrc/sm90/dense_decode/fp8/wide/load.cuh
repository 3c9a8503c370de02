// A block's loads by its value warps, by TMA: a piece's queries; a tile's raw rows, and their
// conversion to 16 bit.
//
// The loads of a part in order are, of each piece that is not empty, its queries, then its tiles,
// of which each warp has eight tokens. A warp's first lane begins them, and keeps in shared memory
// where it is: there are no registers to spare.
#pragma once

#include "sm90/dense_decode/fp8/wide/rows.cuh"
#include "sm90/ptx/barrier.cuh"
#include "sm90/ptx/copy_async.cuh"
#include "sm90/ptx/tma.cuh"

namespace flashmla::sm90::dense_decode::fp8::wide {

__device__ __forceinline__ int value_group() { return reread_thread() / 32 - kWarps; }

// Sends the length of the sequence after state.sequence on its way.
__device__ __forceinline__ void copy_length(const WideArgs& args, volatile LoadState& state) {
  if (state.sequence + 1 < args.b) {
    copy_4(smem_address(const_cast<int*>(&state.next_length)),
           args.cache_seqlens + state.sequence + 1);
  }
}

// Sends the block of the next tile, of a sequence, on its way.
__device__ __forceinline__ void copy_block(const WideArgs& args, volatile LoadState& state,
                                           int sequence) {
  copy_4(smem_address(const_cast<int*>(&state.block)), args.block_table +
                                                           int64_t{sequence} * args.max_blocks +
                                                           min(state.entry, args.max_blocks - 1));
}

// Finds the warp's tokens of a tile.
__device__ __forceinline__ void place_tile(const WideArgs& args, volatile LoadState& state,
                                           int tile) {
  const uint32_t token = tile * kTileTokens + value_group() * kGroupTokens;
  const int entry = token / static_cast<uint32_t>(args.block_size);
  state.entry = entry;
  state.token = token - entry * args.block_size;
}

// Enters the sequence after state.sequence, whose length is there, at a tile that is placed.
// Returns whether it has tiles of the part from there on.
__device__ __forceinline__ bool enter(const WideArgs& args, const WideStorage& smem,
                                      volatile LoadState& state, int first_tile) {
  const int length = args.clamp_seqlen(state.next_length);
  const int sequence = state.sequence + 1;
  state.sequence = sequence;
  copy_length(args, state);
  int tiles = num_tiles(length);
  if (sequence == smem.end.sequence) tiles = min(tiles, smem.end.tile);
  if (first_tile >= tiles) return false;
  state.kind = LoadKind::kQueries;
  state.tiles_left = tiles - first_tile;
  state.left = length - first_tile * kTileTokens - value_group() * kGroupTokens;
  return true;
}

// Goes to the next piece that is not empty.
__device__ __forceinline__ void enter_next(const WideArgs& args, const WideStorage& smem,
                                           volatile LoadState& state) {
  state.kind = LoadKind::kNone;
  while (owns_work(smem.begin, smem.end, state.sequence + 1)) {
    wait_copies<0>();
    if (enter(args, smem, state, 0)) {
      place_tile(args, state, 0);
      copy_block(args, state, state.sequence);
      return;
    }
  }
}

__device__ __forceinline__ void load_queries(const WideArgs& args, WideStorage& smem, int slot,
                                             int sequence) {
  const uint32_t full = smem_address(&smem.full[slot]);
  if (value_group() == 0) {
    fence_async_proxy();  // the slot held what ordinary stores wrote
    const int row = sequence * args.rows + first_query_row();
    const uint32_t target = smem_address(smem.latent[slot]);
    const uint32_t bytes = args.query_box * kChunkRowBytes;
    mbarrier_expect(full, bytes * (kLatentChunks + 1));
    tma_load_5d(target, &args.query_half_map, full, 0, row, 0, 0, 0, kEvictNormal);
    tma_load_5d(target + kHalfBytes, &args.query_half_map, full, 0, row, kHalfChunks, 0, 0,
                kEvictNormal);
    tma_load_5d(smem_address(smem.rope[slot]), &args.query_rope_map, full, 0, row, kLatentChunks, 0,
                0, kEvictNormal);
  }
  mbarrier_arrive(full);
}

// Begins the next load, if there is one, into a slot that nobody uses any more, and goes on to the
// one after it. By a warp's first lane.
__device__ __forceinline__ void load_next(const WideArgs& args, WideStorage& smem, int slot) {
  volatile LoadState& state = smem.loads[value_group()];
  const LoadKind kind = state.kind;
  state.rows = kind == LoadKind::kTile ? min(max(state.left, 0), kGroupTokens) : kNoTile;
  if (kind == LoadKind::kQueries) {
    load_queries(args, smem, slot, state.sequence);
    state.kind = LoadKind::kTile;
  } else if (kind == LoadKind::kTile) {
    const GroupRows rows = GroupRows::of(smem, slot, value_group());
    const uint32_t number = state.brought;
    const uint32_t brought = smem_address(&smem.brought[number % 2][value_group()]);
    wait_copies<0>();
    const int token = state.token, block = state.block;
    mbarrier_arrive_expect(brought, kGroupTokens * V32::kRowBytes);
    tma_load_4d(rows.right(), &args.code_map, brought, 0, token, 0, block, args.cache_hint);
    tma_load_3d(rows.left, &args.rest_map, brought, 0, token, block, args.cache_hint);
    state.brought = number + 1;
    const int left = state.tiles_left - 1;
    if (left == 0) {
      enter_next(args, smem, state);
    } else {
      int next = token + args.token_step, entry = state.entry + args.entry_step;
      if (next >= args.block_size) {
        next -= args.block_size;
        ++entry;
      }
      state.tiles_left = left;
      state.left = state.left - kTileTokens;
      state.entry = entry;
      state.token = next;
      copy_block(args, state, state.sequence);
    }
  }
  commit_copies();
}

// Begins the part's first two loads. By a warp's first lane.
__device__ __forceinline__ void start_loads(const WideArgs& args, WideStorage& smem) {
  volatile LoadState& state = smem.loads[value_group()];
  const Cut begin = smem.begin;
  state.brought = 0;
  state.kind = LoadKind::kNone;
  state.sequence = begin.sequence - 1;
  if (owns_work(begin, smem.end, begin.sequence) && args.max_blocks > 0) {
    // At once, whatever the length.
    place_tile(args, state, begin.tile);
    copy_length(args, state);
    copy_block(args, state, begin.sequence);
    commit_copies();
    wait_copies<0>();
    if (!enter(args, smem, state, begin.tile)) enter_next(args, smem, state);
    commit_copies();
  }
  load_next(args, smem, 0);
  load_next(args, smem, 1);
}

// What convert_tile is to be told, of what was the warp's last load: its tokens that are the
// sequence's, if it is a tile; and how many tiles were brought.
struct LastLoad {
  int rows;
  uint32_t brought;

  static __device__ __forceinline__ LastLoad of(const WideStorage& smem) {
    const volatile LoadState& state = smem.loads[value_group()];
    return {state.rows, state.brought};
  }
};

// Converts a value warp's share of the load in `slot`, and tells the scores.
__device__ __forceinline__ void convert_tile(WideStorage& smem, int slot, LastLoad load) {
  if (load.rows == kNoTile) return;
  const int group = value_group(), lane = reread_thread() % 32;
  const GroupRows rows = GroupRows::of(smem, slot, group);
  const uint32_t number = load.brought - 1;
  mbarrier_wait(smem_address(&smem.brought[number % 2][group]), number / 2 % 2);
  if (load.rows < kGroupTokens) [[unlikely]]
    zero_rows(rows, load.rows, lane);
  convert_rows(rows, lane);
  fence_async_proxy();
  __syncwarp();
  if (lane == 0) mbarrier_arrive(smem_address(&smem.full[slot]));
}

}  // namespace flashmla::sm90::dense_decode::fp8::wide
