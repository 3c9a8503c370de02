// A cluster's converting warpgroups: rows from global memory through registers to 16-bit rows in
// the shared memory of both blocks.
//
// The two blocks have different heads of the same query tokens. Each converts every other quarter
// of a tile, and stores it to both. A warp has four rows of each quarter, a unit. While a tile's
// are stored, the next tile's are on their way: that hides how long memory takes. They are
// converted before their buffer is free.
#pragma once

#include "sm90/ptx/barrier.cuh"
#include "sm90/sparse_decode/wide/plan.cuh"
#include "sm90/sparse_decode/wide/target.cuh"

namespace flashmla::sm90::sparse::wide {

template <typename T, typename Main, typename Extra>
struct PeerConverter {
  using Storage = SharedStorage<Main, Extra, Feed::kPeers>;
  static constexpr int kUnits = 2;  // of a tile
  static constexpr bool kSame = std::is_same_v<Main, Extra>;
  static constexpr bool kRope = !RopeUnit<Main>::kNone;
  static constexpr int kCodeChunks =
      Main::kCodeColumns < kValueDim ? Main::kCodeColumns / 64 : kLatentChunks;

  // Of the next tile. All its loads go out together: the hardware has few counters to wait for
  // loads by, so that waiting for one mostly means to wait for all.
  RawUnit raw[kUnits];
  uint4 rope[kUnits];
  PieceOffsets<0> offsets;
  int rank;

  __device__ __forceinline__ int quarter_of(int unit) const { return unit * 2 + rank; }

  template <typename Format, typename AnyPlan>
  __device__ __forceinline__ void load_from(const AnyPlan& plan) {
#pragma unroll
    for (int unit = 0; unit < kUnits; ++unit) {
      load_unit<Format>(raw[unit],
                        GlobalRows<Format, AnyPlan>{plan, first_token(quarter_of(unit))});
    }
  }

  template <typename AnyPlan>
  __device__ __forceinline__ void load(const AnyPlan& plan, Source source) {
    if (source == Source::kNone) return;
    if (kSame || source == Source::kMain)
      load_from<Main>(plan);
    else
      load_from<Extra>(plan);
    if constexpr (kRope) {
#pragma unroll
      for (int unit = 0; unit < kUnits; ++unit) {
        RopeUnit<Main>::load(rope[unit],
                             GlobalRows<Main, AnyPlan>{plan, first_token(quarter_of(unit))});
      }
    }
  }

  __device__ __forceinline__ Mend convert(uint32_t (&columns)[kUnitPieces][8], int unit,
                                          Source source) {
    if (kSame || source == Source::kMain) return convert_unit<T, Main, 0>(columns, raw[unit]);
    return convert_unit<T, Extra, 0>(columns, raw[unit]);
  }

  static __device__ __forceinline__ uint32_t kept_rope(Storage& smem, int unit) {
    return smem_address(&smem.rope[unit][threadIdx.x % kWarpgroupThreads]);
  }

  __device__ __forceinline__ void run(const sparse::KernelArgs& args, Storage& smem) {
    const int lane = threadIdx.x % 32;
    rank = cluster_rank();
    offsets.find();
    const uint32_t here = smem_address(&smem), peer_less = map_shared(here, rank ^ 1) - here;
    Planner<Main, Extra, Feed::kPeers> planner{args, smem};
    planner.start();
    Source source = plan_rows(planner);
    load(smem.plan[0], source);
    if (source == Source::kNone) return;
    Source next = plan_rows(planner);
    for (uint32_t tile = 0; source != Source::kNone; ++tile) {
      const int buffer = Storage::buffer_of(tile);
      const uint32_t free = Storage::parity_of(tile) ^ 1;
      const Target<2> target{smem_address(smem.keys[buffer][0]),
                             smem_address(&smem.keys_full[buffer]), peer_less};
      uint32_t columns[kUnitPieces][8];
      Mend mend = convert(columns, 0, source);
      mbarrier_wait(smem_address(&smem.keys_empty[buffer][quarter_of(0)]), free);
      store_unit<Main>(target, offsets, columns, mend, quarter_of(0));
      fence_async_proxy();
      __syncwarp();
      if (lane < kCodeChunks) target.send(lane, first_token(quarter_of(0)));
      mend = convert(columns, 1, source);
      if constexpr (kRope) {  // kept in shared memory: registers are short
#pragma unroll
        for (int unit = 0; unit < kUnits; ++unit) store_shared(kept_rope(smem, unit), rope[unit]);
      }
      load(smem.plan[(tile + 1) % kPlans], next);
      mbarrier_wait(smem_address(&smem.keys_empty[buffer][quarter_of(1)]), free);
      store_unit<Main>(target, offsets, columns, mend, quarter_of(1));
      if constexpr (kRope) {
        // Where probabilities lay, which are read with the last tokens.
        mbarrier_wait(smem_address(&smem.keys_empty[buffer][kQuarters - 1]), free);
#pragma unroll
        for (int unit = 0; unit < kUnits; ++unit) {
          RopeUnit<Main>::template store<T>(target, load_shared(kept_rope(smem, unit)),
                                            first_token(quarter_of(unit)));
        }
      }
      fence_async_proxy();
      __syncwarp();
      if (lane < kCodeChunks) target.send(lane, first_token(quarter_of(1)));
      if (lane == 0) {
        if (threadIdx.x / 32 % kWarps == 0)
          mbarrier_arrive_expect(target.full, Storage::kChunks * kChunkBytes / 2);
        else
          mbarrier_arrive(target.full);
      }
      source = next;
      if (next != Source::kNone) next = plan_rows(planner);
    }
  }
};

}  // namespace flashmla::sm90::sparse::wide
