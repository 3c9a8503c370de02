// Filling the ring, by a warp of one value warpgroup and of the other in turn: their warpgroup
// waits for them, so a load takes few instructions. Where tiles are is looked up many at once,
// ahead of their loads, by a score warp.
#pragma once

#include "sm90/dense_decode/fp8/shared_storage.cuh"
#include "sm90/ptx/barrier.cuh"
#include "sm90/ptx/cluster.cuh"
#include "sm90/ptx/matrix.cuh"
#include "sm90/ptx/tma.cuh"

namespace flashmla::sm90::dense_decode::fp8 {

// The warp that fills the ring for the first time; the one that looks tiles up afterwards.
__device__ __forceinline__ bool is_first_loader() { return reread_thread() / 32 == kRoleWarps; }
__device__ __forceinline__ bool is_planner() { return reread_thread() / 32 == 1; }

// The planner looks tiles up after each tile whose number is a multiple of this, but the part's
// first: by then the first loader is through.
constexpr int kPlanStep = 4;

// Tiles that must have been looked up after `tile`: their places are made at the next call, are
// seen two tiles later, with side 0's next probabilities, and must do until the call after that,
// for tiles as many ahead as the ring has stages.
constexpr int kPlannedAhead = 2 * kPlanStep + 2 + 4;
// With what is looked up at once.
static_assert(kPlannedAhead * kMaxPieces + 32 <= kPlannedPieces);
static_assert(kPlannedAhead + 32 <= kPlaces);

__device__ __forceinline__ void copy_async(int32_t* target, const int32_t* source) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(smem_address(target)), "l"(source)
               : "memory");
}

__device__ __forceinline__ void wait_copies_of_warp() {
  asm volatile("cp.async.wait_all;" ::: "memory");
  __syncwarp();
}

// Sends the length of a sequence on its way to shared memory.
template <typename Storage>
__device__ __forceinline__ void copy_length(const KernelArgs& args, Storage& smem, int sequence) {
  if (reread_thread() % 32 == 0 && sequence < args.b) {
    copy_async(&smem.next_length, args.cache_seqlens + sequence);
  }
}

// Goes to the next sequence, whose length is there or on its way, at its tile `first_tile`.
template <typename Storage>
__device__ __forceinline__ void enter_sequence(const KernelArgs& args, Storage& smem,
                                               LoadState& state, int first_tile) {
  ++state.sequence;
  wait_copies_of_warp();
  const int length = args.clamp_seqlen(*const_cast<volatile int32_t*>(&smem.next_length));
  __syncwarp();
  copy_length(args, smem, state.sequence + 1);
  const Cut end = smem.end;
  state.tile = first_tile;
  state.tile_end = num_tiles(length);
  if (state.sequence == end.sequence) state.tile_end = min(state.tile_end, end.tile);
}

// Sends the places of 32 pieces, from the next tile to look up on, on their way to the plan.
template <typename Storage>
__device__ __forceinline__ void copy_places(const KernelArgs& args, Storage& smem, int looked_up,
                                            int sequence, int tile) {
  const int lane = reread_thread() % 32;
  const uint32_t token = tile * kTileTokens + lane * args.piece;
  const uint32_t entry = token / static_cast<uint32_t>(args.block_size);
  int32_t (&place)[2] = smem.plan[(looked_up * args.pieces + lane) % kPlannedPieces];
  place[0] = token - entry * args.block_size;
  copy_async(&place[1], args.block_table + int64_t{sequence} * args.max_blocks +
                            min(static_cast<int>(entry), args.max_blocks - 1));
}

// Counts those of the pieces just copied that the sequence has.
__device__ __forceinline__ void count_tiles(const KernelArgs& args, LoadState& state) {
  const int count = min(state.tile_end - state.tile, 32 * opaque(args.piece) / kTileTokens);
  state.looked_up += count;
  state.tile += count;
}

// Looks up the part's next tiles, at least one, if there are any; returns whether there are.
template <typename Storage>
__device__ __forceinline__ bool look_up(const KernelArgs& args, Storage& smem, LoadState& state) {
  while (state.tile >= state.tile_end) {
    if (!owns_work(smem.begin, smem.end, state.sequence + 1)) return false;
    enter_sequence(args, smem, state, 0);
  }
  copy_places(args, smem, state.looked_up, state.sequence, state.tile);
  count_tiles(args, state);
  return true;
}

// Puts where the tiles are that were looked up, once that is known.
template <typename Storage>
__device__ __forceinline__ void make_places(const KernelArgs& args, Storage& smem, LoadState& state,
                                            int row_bytes) {
  wait_copies_of_warp();
  for (const int end = state.looked_up; state.placed < end;) {
    const int number = state.placed + reread_thread() % 32;
    const int token = smem.plan[number * args.pieces % kPlannedPieces][0];
    const int block = smem.plan[number * args.pieces % kPlannedPieces][1];
    const bool run =
        args.pieces == 1 && static_cast<uint32_t>(block) < static_cast<uint32_t>(args.num_blocks);
    const uint64_t source =
        reinterpret_cast<uint64_t>(args.blocks) + block * args.block_bytes + token * row_bytes;
    if (number < end) {
      store_shared(smem_address(&smem.places[number % kPlaces]),
                   {static_cast<uint32_t>(source), static_cast<uint32_t>(source >> 32),
                    static_cast<uint32_t>(run ? number : ~number), 0});
    }
    state.placed = min(state.placed + 32, end);
  }
  __syncwarp();
}

// Copies a tile that is not one run of bytes, a piece a lane. Blocks that do not exist are zeros.
template <typename Format, int kRows>
__device__ __forceinline__ void copy_pieces(const KernelArgs& args,
                                            SharedStorage<Format, kRows>& smem, uint32_t number,
                                            uint32_t target, uint32_t full) {
  const int lane = reread_thread() % 32, pieces = opaque(args.pieces), piece = opaque(args.piece);
  const int32_t* const place = smem.plan[(number * pieces + lane) % kPlannedPieces];
  const int token = place[0], block = place[1];
  const bool exists = static_cast<uint32_t>(block) < static_cast<uint32_t>(args.num_blocks);
  const uint32_t copied = __ballot_sync(~0u, pieces > 1 && exists && lane < pieces);
#pragma unroll 1
  for (int i = 0; i < kTileTokens; i += kLeastPiece) {
    if (copied >> i / piece & 1) continue;
#pragma unroll 1
    for (int at = lane * 16; at < kLeastPiece * Format::kRowBytes; at += 32 * 16) {
      store_shared(target + Format::offset(i) + at, uint4{});
    }
  }
  fence_async_proxy();  // before copies that come to lie there later
  __syncwarp();
  if (lane == 0) mbarrier_arrive_expect(full, __popc(copied) * piece * Format::kRowBytes);
  __syncwarp();
  if (copied >> lane & 1) {
    copy_bulk(target + Format::offset(lane * piece),
              args.blocks + block * args.block_bytes + token * Format::kRowBytes,
              piece * Format::kRowBytes, full, args.cache_hint);
  }
}

// Loads tile `number` of the part, if there is one, into a stage that is empty.
template <typename Format, int kRows>
__device__ __forceinline__ void copy_tile(const KernelArgs& args,
                                          SharedStorage<Format, kRows>& smem, uint32_t number,
                                          int stage) {
  const uint4 place = load_shared(smem_address(&smem.places[number % kPlaces]));
  const uint32_t target = smem_address(smem.ring[stage]), full = smem_address(&smem.full[stage]);
  if (place.z == number) {
    if (elect_lane()) {
      const uint64_t source = place.x | uint64_t{place.y} << 32;
      mbarrier_arrive_expect(full, kTileTokens * Format::kRowBytes);
#pragma unroll
      for (int i = 0; i < kTileTokens / Format::kCopyTokens; ++i) {
        constexpr int kBytes = Format::kCopyTokens * Format::kRowBytes;
        copy_bulk(target + i * Format::kCopyStride,
                  reinterpret_cast<const void*>(source + i * kBytes), kBytes, full,
                  args.cache_hint);
      }
    }
  } else if (place.z == ~number) {
    copy_pieces<Format>(args, smem, number, target, full);
  }
  __syncwarp();
}

// Loads a tile, if the part has one, into the stage that the last tile has left. After it is
// computed, by the value warpgroup whose turn it is.
template <typename Format, int kRows>
__device__ __forceinline__ void load_again(const KernelArgs& args,
                                           SharedStorage<Format, kRows>& smem, Position<kRows> at) {
  if (reread_thread() / 32 != kRoleWarps + at.buffer() * kWarps + 1) return;
  mbarrier_wait(smem_address(&smem.empty[at.stage()]), at.ring_parity());
  copy_tile<Format>(args, smem, at.tile() + kStages<kRows>, at.stage());
}

// Makes places of the tiles that the last call looked up, and looks up more.
template <typename Format, int kRows>
__device__ __forceinline__ void plan_tiles(const KernelArgs& args,
                                           SharedStorage<Format, kRows>& smem, int tile) {
  LoadState state = smem.loads;
  make_places(args, smem, state, Format::kRowBytes);
#pragma unroll 1
  while (state.looked_up < tile + kPlannedAhead && look_up(args, smem, state)) {
  }
  __syncwarp();
  if (reread_thread() % 32 == 0) smem.loads = state;
  __syncwarp();
}

// Fills the ring for the first time.
template <typename Format, int kRows>
__device__ __forceinline__ void start_loads(const KernelArgs& args,
                                            SharedStorage<Format, kRows>& smem) {
  const Cut begin = smem.begin;
  if (!owns_work(begin, smem.end, begin.sequence) || args.max_blocks == 0) return;
  LoadState state{begin.sequence - 1, 0, 0, 0, 0};
  copy_length(args, smem, begin.sequence);
  copy_places(args, smem, 0, begin.sequence, begin.tile);  // at once, whatever the length
  enter_sequence(args, smem, state, begin.tile);
  if (state.tile < state.tile_end) {
    count_tiles(args, state);
  } else {
    look_up(args, smem, state);
  }
  make_places(args, smem, state, Format::kRowBytes);
#pragma unroll 1
  for (int tile = 0; tile < kStages<kRows>; ++tile) {
    if (tile >= state.placed) {
      if (!look_up(args, smem, state)) break;
      make_places(args, smem, state, Format::kRowBytes);
    }
    copy_tile<Format>(args, smem, tile, tile);
  }
#pragma unroll 1
  while (state.looked_up < kPlannedAhead && look_up(args, smem, state)) {
  }
  make_places(args, smem, state, Format::kRowBytes);
  if (threadIdx.x % 32 == 0) smem.loads = state;
  __syncwarp();
}

}  // namespace flashmla::sm90::dense_decode::fp8
