// Filling the ring: for each piece its queries, then the rows that its indices name. By the last
// value warpgroup: its warp w fills slot w of each item, ahead of what it computes.
#pragma once

#include "sm90/ptx/barrier.cuh"
#include "sm90/ptx/matrix.cuh"
#include "sm90/ptx/tma.cuh"
#include "sm90/sparse_decode/narrow/shared_storage.cuh"
#include "sm90/sparse_decode/work.cuh"

namespace flashmla::sm90::sparse::narrow {

// Sends a lane's index of the next tile on its way to shared memory; -1 where there is none.
template <typename Storage>
__device__ __forceinline__ void fetch_index(const KernelArgs& args, Storage& smem,
                                            const GatherState& state) {
  const int thread = reread_thread(), warp = thread / 32 % kWarps, lane = thread % 32;
  if (lane >= kSlotTokens || state.tile >= state.tile_end) return;
  const int i = state.tile * kTileTokens + warp * kSlotTokens + lane;
  int32_t& target = smem.next_index[warp][lane];
  if (i >= state.length) {
    target = -1;
    return;
  }
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(smem_address(&target)),
               "l"(args.main.indices + int64_t{state.query} * args.main.topk + i)
               : "memory");
}

// What fetch_index fetched; -1 in lanes without a row.
template <typename Storage>
__device__ __forceinline__ int take_index(const Storage& smem) {
  const int thread = reread_thread(), lane = thread % 32;
  asm volatile("cp.async.wait_all;" ::: "memory");
  if (lane >= kSlotTokens) return -1;
  return *const_cast<const volatile int32_t*>(&smem.next_index[thread / 32 % kWarps][lane]);
}

// Goes to the next query token that has a tile in this part.
template <int kRows>
__device__ __forceinline__ void enter_query(const KernelArgs& args, Cut end, GatherState& state,
                                            int query, int first_tile) {
  state.tile = state.tile_end = 0;
  for (; query < end.sequence || (query == end.sequence && end.tile > 0); ++query) {
    state.length = load_length(args.main, query);
    state.tile = first_tile;
    state.tile_end = num_tiles(state.length);
    if (query == end.sequence) state.tile_end = min(state.tile_end, end.tile);
    if (state.tile < state.tile_end) break;
    first_tile = 0;
  }
  state.query = query;
  state.queries_left = kQueryItems;
}

template <typename Format, int kRows>
__device__ __forceinline__ void start_gather(const KernelArgs& args,
                                             SharedStorage<Format, kRows>& smem) {
  const int warp = threadIdx.x / 32 % kWarps;
  GatherState state;
  state.stage = 0;
  state.parity = 0;
  state.room = kStages;
  enter_query<kRows>(args, smem.end, state, smem.begin.sequence, smem.begin.tile);
  fetch_index(args, smem, state);
  if (threadIdx.x % 32 == 0) smem.gather[warp] = state;
  __syncwarp();
}

// Fills the warp's slot with its share of the queries.
template <typename Format, int kRows>
__device__ __forceinline__ void fill_queries(const KernelArgs& args,
                                             SharedStorage<Format, kRows>& smem,
                                             const GatherState& state) {
  constexpr int kBytes = Format::kHeadDim * 2;  // of a head
  const int thread = reread_thread(), warp = thread / 32 % kWarps;
  if (thread % 32 > 0) return;
  const HeadTile heads = HeadTile::of_block<kRows>(args);
  const int first = ((kQueryItems - state.queries_left) * kTileSlots + warp) * kSlotHeads<kRows>;
  const int count = min(max(heads.count - first, 0), kSlotHeads<kRows>);
  const uint32_t full = smem_address(&smem.full[state.stage][warp]);
  mbarrier_arrive_expect(full, count * kBytes);
  if (count == 0) return;
  const int64_t head = int64_t{state.query} * args.h_q + heads.first + first;
  copy_bulk(smem_address(smem.ring[state.stage][warp]), args.q + head * kBytes, count * kBytes,
            full);
}

template <typename Format, typename Storage>
__device__ __forceinline__ const uint8_t* row_address(const KernelArgs& args, const Storage& smem,
                                                      int index) {
  const uint32_t block = static_cast<uint32_t>(index) / args.main.block_size;
  const uint32_t offset = static_cast<uint32_t>(index) - block * args.main.block_size;
  return smem.layer + block * args.main.block_bytes + offset * Format::kRowBytes;
}

// Fills the warp's slot with a tile's rows.
template <typename Format, int kRows>
__device__ __forceinline__ void fill_rows(const KernelArgs& args,
                                          SharedStorage<Format, kRows>& smem, int stage,
                                          int index) {
  constexpr int kBytes = Format::kRowBytes;
  const int thread = reread_thread(), warp = thread / 32 % kWarps, lane = thread % 32;
  const bool valid = static_cast<uint32_t>(index) < args.main.layer_slots;
  const uint32_t valid_rows = __ballot_sync(~0u, valid);
  const uint32_t full = smem_address(&smem.full[stage][warp]);
  const uint32_t target = smem_address(smem.ring[stage][warp]);
  // Rows that are not attended count as zeros: what else they held might be NaN.
  uint32_t invalid_rows = ~valid_rows & ((1 << kSlotTokens) - 1);
  if (invalid_rows != 0) {
#pragma unroll 1
    do {
      const int row = __ffs(invalid_rows) - 1;
      invalid_rows &= invalid_rows - 1;
      for (int i = lane * 16; i < kBytes; i += 32 * 16) {
        store_shared(target + row * kBytes + i, uint4{});
      }
    } while (invalid_rows != 0);
    fence_async_proxy();  // before copies that come to lie there later
  }
  if (lane == 0) smem.valid[stage][warp] = valid_rows;
  __syncwarp();
  if (lane == 0) mbarrier_arrive_expect(full, __popc(valid_rows) * kBytes);
  __syncwarp();
  if (valid) {
    copy_bulk(target + lane * kBytes, row_address<Format>(args, smem, index), kBytes, full);
  }
}

// Fills the stages that this warpgroup is through with, `freed` more than before; waits for the
// others to be so too.
template <typename Format, int kRows>
__device__ __forceinline__ void fill_ring(const KernelArgs& args,
                                          SharedStorage<Format, kRows>& smem, int freed) {
  const int thread = reread_thread(), warp = thread / 32 % kWarps;
  GatherState state = smem.gather[warp];
  if (state.tile >= state.tile_end) return;
  state.room += freed;
#pragma unroll 1
  while (state.room > 0 && state.tile < state.tile_end) {
    --state.room;
    // Of the slot's last round; passes at once in the first.
    mbarrier_wait(smem_address(&smem.empty[state.stage][warp]), state.parity ^ 1);
    if (state.queries_left > 0) {
      fill_queries(args, smem, state);
      --state.queries_left;
    } else {
      fill_rows(args, smem, state.stage, take_index(smem));
      if (++state.tile >= state.tile_end)
        enter_query<kRows>(args, smem.end, state, state.query + 1, 0);
      fetch_index(args, smem, state);
    }
    if (++state.stage == kStages) {
      state.stage = 0;
      state.parity ^= 1;
    }
  }
  __syncwarp();
  if (thread % 32 == 0) smem.gather[warp] = state;
  __syncwarp();
}

}  // namespace flashmla::sm90::sparse::narrow
