// Filling the ring with tiles, by the first score warp. It looks up blocks, and brings them to L2,
// some tiles before it loads them.
#pragma once

#include "sm90/dense_decode/fp8/shared_storage.cuh"
#include "sm90/ptx/barrier.cuh"
#include "sm90/ptx/tma.cuh"

namespace flashmla::sm90::dense_decode::fp8 {

constexpr int kBatchTiles = 32 / kMaxPieces;  // that a warp looks up at once
static_assert(kPlannedTiles >= 2 * kBatchTiles);

__device__ __forceinline__ bool is_loader() { return reread_thread() < 32; }

__device__ __forceinline__ void copy_async(int32_t* target, const int32_t* source) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(smem_address(target)), "l"(source)
               : "memory");
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

// Sends the block ids of the next tiles of the sequence on their way to shared memory.
template <typename Storage>
__device__ __forceinline__ void look_up(const KernelArgs& args, Storage& smem, LoadState& state) {
  const int lane = reread_thread() % 32, piece = lane % kMaxPieces;
  const int count = min(state.tile_end - state.tile, kBatchTiles);
  if (lane / kMaxPieces < count && piece * args.piece < kTileTokens) {
    const int token = (state.tile + lane / kMaxPieces) * kTileTokens + piece * args.piece;
    PlannedTile& plan = smem.plan[(state.looked_up + lane / kMaxPieces) % kPlannedTiles];
    if (piece == 0) plan.first_token = token;
    copy_async(&plan.blocks[piece], args.block_table + int64_t{state.sequence} * args.max_blocks +
                                        min(token / args.block_size, args.max_blocks - 1));
  }
  state.looked_up += count;
  state.tile += count;
  if (state.tile >= state.tile_end) enter_sequence(args, smem, state, state.sequence + 1, 0);
}

// Coordinates of a piece of a tile: token of the block, block.
__device__ __forceinline__ int2 piece_at(const KernelArgs& args, const PlannedTile& plan,
                                         int piece) {
  const volatile PlannedTile& planned = plan;
  return {(planned.first_token + piece * args.piece) % args.block_size, planned.blocks[piece]};
}

// Once the block ids that are on their way are there, brings those tiles to L2.
template <typename Storage>
__device__ __forceinline__ void prefetch_tiles(const KernelArgs& args, Storage& smem,
                                               LoadState& state) {
  const int lane = reread_thread() % 32, piece = lane % kMaxPieces;
  asm volatile("cp.async.wait_all;" ::: "memory");
  __syncwarp();
  const int tile = state.planned + lane / kMaxPieces;
  if (tile < state.looked_up && piece * args.piece < kTileTokens) {
    const int2 at = piece_at(args, smem.plan[tile % kPlannedTiles], piece);
    prefetch_box_3d(&args.cache_map, 0, at.x, at.y);
  }
  state.planned = state.looked_up;
}

// Loads the next planned tile, piece by piece. Pieces of blocks that do not exist become zeros.
template <typename Format, int kRows>
__device__ __forceinline__ void load_tile(const KernelArgs& args,
                                          SharedStorage<Format, kRows>& smem, LoadState& state) {
  const int lane = reread_thread() % 32;
  const uint32_t full = smem_address(&smem.full[state.stage]);
  // Of the stage's last round; passes at once in the first.
  mbarrier_wait(smem_address(&smem.empty[state.stage]), state.parity ^ 1);
  if (lane == 0) mbarrier_arrive_expect(full, kTileTokens * Format::kPitch);
  __syncwarp();
  if (lane * args.piece < kTileTokens) {
    const int2 at = piece_at(args, smem.plan[state.loaded % kPlannedTiles], lane);
    tma_load_3d(smem_address(smem.ring[state.stage]) + lane * args.piece * Format::kPitch,
                &args.cache_map, full, 0, at.x, at.y, args.cache_hint);
  }
  __syncwarp();
  ++state.loaded;
  if (++state.stage == kStages<kRows>) {
    state.stage = 0;
    state.parity ^= 1;
  }
}

// Loads up to `room` tiles, as their stages become empty, and plans ahead.
template <typename Format, int kRows>
__device__ __forceinline__ void fill_ring(const KernelArgs& args,
                                          SharedStorage<Format, kRows>& smem, LoadState& state,
                                          int room) {
#pragma unroll 1
  do {
    if (state.looked_up > state.planned) prefetch_tiles(args, smem, state);
#pragma unroll 1
    for (; room > 0 && state.loaded < state.planned; --room) load_tile(args, smem, state);
    if (state.tile < state.tile_end && state.looked_up - state.loaded <= kPlannedTiles / 4) {
      look_up(args, smem, state);
    }
  } while (room > 0 && state.loaded < state.looked_up);
}

// Fills the ring for the first time.
template <typename Format, int kRows>
__device__ __forceinline__ void start_loads(const KernelArgs& args,
                                            SharedStorage<Format, kRows>& smem) {
  const Cut begin = smem.begin;
  LoadState state{};
  if (threadIdx.x == 0 && begin.sequence < args.b) {
    copy_async(&smem.next_length, args.cache_seqlens + begin.sequence);
  }
  enter_sequence(args, smem, state, begin.sequence, begin.tile);
  if (state.tile < state.tile_end) {
    look_up(args, smem, state);
    fill_ring(args, smem, state, kStages<kRows>);
  }
  if (threadIdx.x == 0) smem.loads = state;
  __syncwarp();
}

// Called when a tile's probabilities are stored: the values are at the last tile, if not past it,
// and its stage is filled again. The part's first tile has none before it.
template <typename Format, int kRows>
__device__ __forceinline__ void refill(const KernelArgs& args, SharedStorage<Format, kRows>& smem) {
  LoadState state = smem.loads;
  if (state.loaded == state.looked_up) return;  // nothing is left
  const bool first = !state.started;
  state.started = true;
  if (!first) fill_ring(args, smem, state, 1);
  __syncwarp();
  if (reread_thread() == 0) smem.loads = state;
  __syncwarp();
}

}  // namespace flashmla::sm90::dense_decode::fp8
