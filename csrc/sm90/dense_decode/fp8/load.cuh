// Filling the ring with tiles, by the first value warp, ahead of what it computes.
#pragma once

#include "sm90/dense_decode/fp8/shared_storage.cuh"
#include "sm90/ptx/barrier.cuh"
#include "sm90/ptx/tma.cuh"

namespace flashmla::sm90::dense_decode::fp8 {

// The first value warp.
__device__ __forceinline__ bool is_loader() { return reread_thread() / 32 == kRoleWarps; }

__device__ __forceinline__ void copy_async(int32_t* target, const int32_t* source) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(smem_address(target)), "l"(source)
               : "memory");
}

// Sends the ids of the next tile's blocks on their way to shared memory, one for each load.
template <typename Storage>
__device__ __forceinline__ void fetch_blocks(const KernelArgs& args, Storage& smem,
                                             const LoadState& state) {
  const int token = state.tile * kTileTokens + reread_thread() % 32 * args.piece;
  if (state.tile >= state.tile_end || token >= (state.tile + 1) * kTileTokens) return;
  const int entry = min(token / args.block_size, args.max_blocks - 1);
  copy_async(&smem.next_blocks[token % kTileTokens / args.piece],
             args.block_table + int64_t{state.sequence} * args.max_blocks + entry);
}

// Goes to the next sequence that has a tile in this part.
template <typename Storage>
__device__ __forceinline__ void enter_sequence(const KernelArgs& args, Storage& smem,
                                               LoadState& state, int sequence, int first_tile) {
  const Cut end = smem.end;
  state.tile = state.tile_end = 0;
  for (; sequence < end.sequence || (sequence == end.sequence && end.tile > 0); ++sequence) {
    asm volatile("cp.async.wait_all;" ::: "memory");
    __syncwarp();
    const int length = args.clamp_seqlen(*const_cast<volatile int32_t*>(&smem.next_length));
    __syncwarp();
    if (reread_thread() % 32 == 0 && sequence + 1 < args.b) {
      copy_async(&smem.next_length, args.cache_seqlens + sequence + 1);
    }
    state.tile = first_tile;
    state.tile_end = num_tiles(length);
    if (sequence == end.sequence) state.tile_end = min(state.tile_end, end.tile);
    if (state.tile < state.tile_end) break;
    first_tile = 0;
  }
  state.sequence = sequence;
}

template <typename Format, int kRows>
__device__ __forceinline__ void start_loads(const KernelArgs& args,
                                            SharedStorage<Format, kRows>& smem) {
  const Cut begin = smem.begin;
  LoadState state;
  state.stage = 0;
  state.parity = 0;
  state.room = kStages<kRows> - 1;
  if (threadIdx.x % 32 == 0 && begin.sequence < args.b) {
    copy_async(&smem.next_length, args.cache_seqlens + begin.sequence);
  }
  enter_sequence(args, smem, state, begin.sequence, begin.tile);
  fetch_blocks(args, smem, state);
  if (threadIdx.x % 32 == 0) smem.loads = state;
  __syncwarp();
}

// Loads the next tile, piece by piece. Pieces of blocks that do not exist become zeros.
template <typename Format, int kRows>
__device__ __forceinline__ void load_tile(const KernelArgs& args,
                                          SharedStorage<Format, kRows>& smem,
                                          const LoadState& state) {
  const int lane = reread_thread() % 32;
  const uint32_t full = smem_address(&smem.full[state.stage]);
  asm volatile("cp.async.wait_all;" ::: "memory");
  if (lane == 0) mbarrier_arrive_expect(full, kTileTokens * Format::kPitch);
  __syncwarp();
  if (lane * args.piece < kTileTokens) {
    const int token = state.tile * kTileTokens + lane * args.piece;
    tma_load_3d(smem_address(smem.ring[state.stage]) + lane * args.piece * Format::kPitch,
                &args.cache_map, full, 0, token % args.block_size,
                *const_cast<volatile int32_t*>(&smem.next_blocks[lane]), args.cache_hint);
  }
  __syncwarp();
}

// Fills the stages that this warp is through with, one more than at the last call; waits for the
// others to be so too.
template <typename Format, int kRows>
__device__ __forceinline__ void fill_ring(const KernelArgs& args,
                                          SharedStorage<Format, kRows>& smem) {
  LoadState state = smem.loads;
  if (state.tile >= state.tile_end) return;
  ++state.room;
#pragma unroll 1
  while (state.room > 0 && state.tile < state.tile_end) {
    --state.room;
    // Of the stage's last round; passes at once in the first.
    mbarrier_wait(smem_address(&smem.empty[state.stage]), state.parity ^ 1);
    load_tile(args, smem, state);
    if (++state.tile >= state.tile_end) enter_sequence(args, smem, state, state.sequence + 1, 0);
    fetch_blocks(args, smem, state);
    if (++state.stage == kStages<kRows>) {
      state.stage = 0;
      state.parity ^= 1;
    }
  }
  __syncwarp();
  if (reread_thread() % 32 == 0) smem.loads = state;
  __syncwarp();
}

}  // namespace flashmla::sm90::dense_decode::fp8
