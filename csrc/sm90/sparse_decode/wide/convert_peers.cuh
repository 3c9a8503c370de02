// A cluster's converting warpgroups: rows from global memory through registers to 16-bit rows in
// the shared memory of both blocks.
//
// The two blocks have different heads of the same query tokens. Each converts every other quarter
// of a tile, and stores it to both. A warp has 128 columns of each quarter, a unit, so that what it
// sends lies together. While a tile's are stored, the next tile's are on their way: that hides how
// long memory takes. They are converted before their buffer is free.
#pragma once

#include "sm90/ptx/barrier.cuh"
#include "sm90/sparse_decode/wide/rows.cuh"
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
  int rank, warp;

  __device__ __forceinline__ int quarter_of(int unit) const { return unit * 2 + rank; }

  // Where this thread keeps a unit's rope columns: registers are short.
  static __device__ __forceinline__ uint32_t kept_rope(Storage& smem, uint32_t tile, int unit) {
    return smem_address(&smem.rope[tile % 2][unit][threadIdx.x % kWarpgroupThreads]);
  }

  template <typename Format>
  __device__ __forceinline__ void load_from(Storage& smem, const RowPlaces& places, uint32_t tile) {
#pragma unroll
    for (int unit = 0; unit < kUnits; ++unit) {
      const UnitPlaces<Format> of_unit(places[unit], rank * kQuarterTokens, warp);
      load_unit<Format>(raw[unit], of_unit);
      if constexpr (kRope) copy_rope<Format>(kept_rope(smem, tile, unit), of_unit);
    }
    if constexpr (kRope) commit_copies();
  }

  __device__ __forceinline__ void load(Storage& smem, const RowPlaces& places, Source source,
                                       uint32_t tile) {
    if (source == Source::kNone) {
      if constexpr (kRope) commit_copies();
    } else if (kSame || source == Source::kMain) {
      load_from<Main>(smem, places, tile);
    } else {
      load_from<Extra>(smem, places, tile);
    }
  }

  __device__ __forceinline__ void convert(uint32_t (&columns)[kUnitPieces][8], int unit,
                                          Source source) {
    if (kSame || source == Source::kMain)
      convert_unit<T, Main>(columns, raw[unit]);
    else
      convert_unit<T, Extra>(columns, raw[unit]);
  }

  // Sends the warp's chunks of a quarter.
  __device__ __forceinline__ void send(const Target<2>& target, int quarter) const {
    fence_async_proxy();
    __syncwarp();
    if (elect_lane()) {
#pragma unroll
      for (int c = 0; c < kWarpChunks; ++c) {
        if (warp * kWarpChunks + c < kCodeChunks) target.send(warp * kWarpChunks + c, quarter);
      }
    }
  }

  __device__ __forceinline__ void run(const sparse::KernelArgs& args, Storage& smem) {
    rank = cluster_rank();
    warp = convert_warp();
    const PieceOffsets offsets = PieceOffsets::of(warp);
    const uint32_t here = smem_address(&smem), peer_less = map_shared(here, rank ^ 1) - here;
    Planner<Main, Extra, Feed::kPeers> planner{args, smem};
    planner.start();
    RowPlaces places;
    Source source = planner.next(places, warp);
    load(smem, places, source, 0);
    for (uint32_t tile = 0; source != Source::kNone; ++tile) {
      const int buffer = Storage::buffer_of(tile);
      const uint32_t free = Storage::parity_of(tile) ^ 1;
      const Target<2> target{smem_address(smem.keys[buffer][0]),
                             smem_address(&smem.keys_full[buffer]), peer_less};
      uint32_t columns[kUnitPieces][8];
      convert(columns, 0, source);
      mbarrier_wait(smem_address(&smem.keys_empty[buffer][quarter_of(0)]), free);
      store_unit<Main>(target, offsets, columns, quarter_of(0));
      send(target, quarter_of(0));
      convert(columns, 1, source);
      source = planner.next(places, warp);
      load(smem, places, source, tile + 1);
      mbarrier_wait(smem_address(&smem.keys_empty[buffer][quarter_of(1)]), free);
      store_unit<Main>(target, offsets, columns, quarter_of(1));
      if constexpr (kRope) {
        wait_copies<1>();
        // Where probabilities lay, which are read with the last tokens.
        mbarrier_wait(smem_address(&smem.keys_empty[buffer][kQuarters - 1]), free);
#pragma unroll
        for (int unit = 0; unit < kUnits; ++unit) {
          store_rope<T, Main>(target, load_shared(kept_rope(smem, tile, unit)), quarter_of(unit));
        }
      }
      send(target, quarter_of(1));
      if (threadIdx.x % 32 == 0) {
        if (warp == 0)
          mbarrier_arrive_expect(target.full, Storage::kChunks * kChunkBytes / 2);
        else
          mbarrier_arrive(target.full);
      }
    }
  }
};

}  // namespace flashmla::sm90::sparse::wide
