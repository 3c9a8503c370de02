// Filling the ring with tiles, by the first value warp. Its warpgroup waits for it, so a tile's own
// load takes few instructions: where tiles are is looked up many at once, ahead of their loads.
#pragma once

#include "sm90/dense_decode/fp8/shared_storage.cuh"
#include "sm90/ptx/barrier.cuh"
#include "sm90/ptx/matrix.cuh"
#include "sm90/ptx/tma.cuh"

namespace flashmla::sm90::dense_decode::fp8 {

// So many tiles before the last one that is looked up, more are. The plan has room for as many, and
// for those that are looked up at once.
constexpr int kEnoughTiles = 2;
static_assert(kEnoughTiles * kMaxPieces + 32 <= kPlannedPieces);

__device__ __forceinline__ bool is_loader() { return reread_thread() / 32 == kRoleWarps; }

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

// Looks up the part's next tiles, if there are any: at least one of a sequence that has some.
template <typename Storage>
__device__ __forceinline__ void look_up(const KernelArgs& args, Storage& smem, LoadState& state) {
  while (state.tile >= state.tile_end) {
    if (!owns_work(smem.begin, smem.end, state.sequence + 1)) return;
    enter_sequence(args, smem, state, 0);
  }
  copy_places(args, smem, state.looked_up, state.sequence, state.tile);
  count_tiles(args, state);
}

// Copies a piece of a planned tile, one a lane. Blocks that do not exist are zeros. Announces all
// bytes on the mbarrier.
template <typename Format, typename Storage>
__device__ __forceinline__ void copy_pieces(const KernelArgs& args, Storage& smem, int number,
                                            uint32_t tile, uint32_t full) {
  const int lane = reread_thread() % 32;
  const int pieces = opaque(args.pieces), piece = opaque(args.piece);
  const int bytes = piece * Format::kRowBytes;
  const volatile int32_t* const place = smem.plan[(number * pieces + lane) % kPlannedPieces];
  const int token = place[0], block = place[1];
  const bool exists = static_cast<uint32_t>(block) < static_cast<uint32_t>(args.num_blocks);
  const uint32_t copied = __ballot_sync(~0u, exists && lane < pieces);
  if (__popc(copied) < pieces) {
#pragma unroll 1
    for (int i = 0; i < pieces; ++i) {
      if (copied >> i & 1) continue;
      for (int at = lane * 16; at < bytes; at += 32 * 16) {
        store_shared(tile + Format::offset(i * piece) + at, uint4{});
      }
    }
    fence_async_proxy();  // before copies that come to lie there later
    __syncwarp();
  }
  if (lane == 0) mbarrier_arrive_expect(full, __popc(copied) * bytes);
  __syncwarp();
  if (copied >> lane & 1) {
    copy_bulk(tile + Format::offset(lane * piece),
              args.blocks + block * args.block_bytes + token * Format::kRowBytes, bytes, full,
              args.cache_hint);
  }
}

// Loads the part's next tile, if there is one, into a stage, once the stage's phase of `parity`
// says that it is empty.
template <typename Format, int kRows>
__device__ __forceinline__ void load_tile(const KernelArgs& args,
                                          SharedStorage<Format, kRows>& smem, int stage,
                                          uint32_t parity) {
  const int number = smem.loads.loaded, looked_up = smem.loads.looked_up;
  if (number == looked_up) return;
  wait_copies_of_warp();
  mbarrier_wait(smem_address(&smem.empty[stage]), parity);
  copy_pieces<Format>(args, smem, number, smem_address(smem.ring[stage]),
                      smem_address(&smem.full[stage]));
  __syncwarp();
  if (reread_thread() % 32 == 0) smem.loads.loaded = number + 1;
  __syncwarp();
  if (looked_up - number <= kEnoughTiles) {
    LoadState state = smem.loads;
    look_up(args, smem, state);
    if (reread_thread() % 32 == 0) smem.loads = state;
  }
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
  if (threadIdx.x % 32 == 0) smem.loads = state;
  __syncwarp();
#pragma unroll 1
  for (int stage = 0; stage < kStages<kRows>; ++stage) load_tile(args, smem, stage, 1);
}

}  // namespace flashmla::sm90::dense_decode::fp8
