// Planning tiles, some of them ahead of their conversion: the score warpgroup looks up where their
// rows are and asks L2 for them, while its products are computed.
#pragma once

#include "sm90/ptx/barrier.cuh"
#include "sm90/sparse_decode/wide/work.cuh"

namespace flashmla::sm90::sparse::wide {

// Brings 64 bytes from HBM to L2.
__device__ __forceinline__ void prefetch_sectors(const void* source) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(source) : "memory");
}

// The part's tiles in order, as one warp of the score warpgroup sees them: it plans sixteen tokens
// of each, one a lane of either half.
template <typename Main, typename Extra>
struct Planner {
  using Storage = SharedStorage<Main, Extra>;
  int32_t index;  // this lane's of the next tile

  __device__ __forceinline__ void start(const sparse::KernelArgs& args, Storage& smem) {
    PlannerState state;
    state.planned = 0;
    enter(args, smem, state, smem.begin.sequence, smem.begin.tile);
    fetch(args, state);
    save(smem, state);
  }

  // Plans tiles until `count` are.
  __device__ __forceinline__ void plan_to(const sparse::KernelArgs& args, Storage& smem,
                                          uint32_t count) {
    const int warp = reread_thread() / 32;
    if (smem.planner[warp].planned >= count) return;
    PlannerState state = smem.planner[warp];
#pragma unroll 1
    while (state.planned < count) {
      auto& plan = smem.plan[state.planned % kPlans];
      const bool ends = state.tile >= state.tile_end, extra = state.tile >= state.tiles.main;
      if (!ends) {
        if (extra)
          place<Extra>(args.extra, smem.layer[1], plan);
        else
          place<Main>(args.main, smem.layer[0], plan);
      }
      if (reread_thread() % 32 == 0) {
        if (warp == 0) {
          plan.source = ends ? Source::kNone : extra ? Source::kExtra : Source::kMain;
        }
        mbarrier_arrive(smem_address(&smem.planned[state.planned % kPlans]));
      }
      __syncwarp();
      ++state.planned;
      if (ends) {
        state.planned = 0x7fffffff;
        break;
      }
      if (++state.tile >= state.tile_end) enter(args, smem, state, state.query + 1, 0);
      fetch(args, state);
    }
    save(smem, state);
  }

 private:
  static __device__ __forceinline__ void save(Storage& smem, const PlannerState& state) {
    __syncwarp();
    if (reread_thread() % 32 == 0) smem.planner[reread_thread() / 32] = state;
    __syncwarp();
  }

  // Goes to the next query token that has a tile in this part, from `next` on.
  static __device__ __forceinline__ void enter(const sparse::KernelArgs& args, const Storage& smem,
                                               PlannerState& state, int next, int first_tile) {
    state.tile = state.tile_end = 0;
    for (state.query = next; owns_work({0, 0}, smem.end, state.query); ++state.query) {
      state.tiles = QueryTiles::of(args, state.query);
      const int all = state.tiles.all;
      state.tile = state.query == next ? first_tile : 0;
      state.tile_end = state.query == smem.end.sequence ? min(all, smem.end.tile) : all;
      if (state.tile < state.tile_end) break;
      state.tile = state.tile_end = 0;
    }
  }

  __device__ __forceinline__ void fetch(const sparse::KernelArgs& args, const PlannerState& state) {
    const int warp = reread_thread() / 32, lane = reread_thread() % 32;
    index = -1;
    if (state.tile >= state.tile_end) return;
    const bool extra = state.tile >= state.tiles.main;
    const SourceArgs& source = extra ? args.extra : args.main;
    const int tile = state.tile - (extra ? state.tiles.main : 0);
    const int i = tile * kTileTokens + warp * kWarpTokens + lane % kWarpTokens;
    if (i < (extra ? state.tiles.extra_length : state.tiles.main_length)) {
      index = __ldg(source.indices + int64_t{state.query} * source.topk + i);
    }
  }

  template <typename Format, typename AnyPlan>
  __device__ __forceinline__ void place(const SourceArgs& source, const uint8_t* layer,
                                        AnyPlan& plan) const {
    const int warp = reread_thread() / 32, lane = reread_thread() % 32;
    const int token = warp * kWarpTokens + lane % kWarpTokens;
    const bool attended = static_cast<uint32_t>(index) < source.layer_slots;
    const uint32_t block = source.block_of(index);
    const uint32_t offset = static_cast<uint32_t>(index) - block * source.block_size;
    const uint8_t* base = layer + block * source.block_bytes;
    const uint8_t* row = attended ? base + int64_t{offset} * source.row_bytes : kZeroRow;
    const uint32_t all = __ballot_sync(~0u, attended);
    if (lane < kWarpTokens) plan.row[token] = row;
    if (lane == 0) plan.attended[warp] = all;
#pragma unroll
    for (int i = 0; i < Format::kRowBytes; i += 2 * 64) {
      const int byte = i + lane / kWarpTokens * 64;
      if (byte < Format::kRowBytes) prefetch_sectors(row + byte);
    }
    if constexpr (Format::kTwoPlanes) {
      const uint8_t* scales =
          base + int64_t{source.block_size} * Format::kRowBytes + offset * Format::kScaleBytes;
      if (!attended) scales = kZeroRow;
      if (lane < kWarpTokens) plan.scales[token] = scales;
      prefetch_sectors(scales);
    }
  }
};

}  // namespace flashmla::sm90::sparse::wide
