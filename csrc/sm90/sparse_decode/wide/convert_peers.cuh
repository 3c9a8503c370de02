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
  static constexpr bool kRopeInSlot = kRope && !Storage::kInRope;
  static constexpr int kCodeChunks =
      Main::kCodeColumns < kValueDim ? Main::kCodeColumns / 64 : kLatentChunks;

  // The first unit of the next tile is on its way to registers, the second one to shared memory:
  // the hardware has few counters to wait for loads by, so that waiting for one of them would mean
  // to wait for all.
  RawUnit raw;
  uint4 rope[kUnits];  // the second unit's too, where its slot has no room for them
  int rank, warp;

  __device__ __forceinline__ int quarter_of(int unit) const { return unit * 2 + rank; }

  template <typename Format>
  __device__ __forceinline__ UnitPlaces<Format> places_of(const RowPlaces<Feed::kPeers>& places,
                                                          int unit) const {
    return {places[unit], rank * kQuarterTokens, warp};
  }

  template <typename Format>
  __device__ __forceinline__ void load_first(const RowPlaces<Feed::kPeers>& places) {
    const UnitPlaces<Format> unit = places_of<Format>(places, 0);
    load_unit<Format>(raw, unit);
    if constexpr (kRope) {
      rope[0] = load_16(unit.rope);
      if constexpr (!kRopeInSlot) rope[1] = load_16(places_of<Format>(places, 1).rope);
    }
  }

  __device__ __forceinline__ void load_first(const RowPlaces<Feed::kPeers>& places, Source source) {
    if (source == Source::kNone) return;
    if (kSame || source == Source::kMain)
      load_first<Main>(places);
    else
      load_first<Extra>(places);
  }

  __device__ __forceinline__ void copy_second(uint32_t slot, const RowPlaces<Feed::kPeers>& places,
                                              Source source) const {
    if (source == Source::kNone) return;
    if (kSame || source == Source::kMain) {
      copy_unit<Main>(slot, places_of<Main>(places, 1));
      if constexpr (kRopeInSlot) copy_rope<Main>(slot, places_of<Main>(places, 1));
    } else {
      copy_unit<Extra>(slot, places_of<Extra>(places, 1));
    }
    commit_copies();
  }

  __device__ __forceinline__ void convert_first(uint32_t (&columns)[kUnitPieces][8],
                                                Source source) const {
    if (kSame || source == Source::kMain)
      convert_unit<T, Main>(columns, raw, warp);
    else
      convert_unit<T, Extra>(columns, raw, warp);
  }

  static __device__ __forceinline__ void convert_second(uint32_t (&columns)[kUnitPieces][8],
                                                        uint4& rope, uint32_t slot, Source source) {
    RawUnit second;
    wait_copies<0>();
    __syncwarp();
    if (kSame || source == Source::kMain) {
      read_unit<Main>(second, slot);
      convert_unit<T, Main>(columns, second, threadIdx.x / 32 % kWarps);
    } else {
      read_unit<Extra>(second, slot);
      convert_unit<T, Extra>(columns, second, threadIdx.x / 32 % kWarps);
    }
    if constexpr (kRopeInSlot) read_rope<Main>(rope, slot);
    __syncwarp();  // before it is filled again
  }

  // Sends the warp's chunks of a quarter.
  __device__ __forceinline__ void send(const Target& target, int quarter) const {
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
    warp = warp_of_four();
    const PieceOffsets offsets =
        PieceOffsets::of(threadIdx.x % 32, warp * kWarpChunks * kChunkBytes);
    const uint32_t here = smem_address(&smem), peer_less = map_shared(here, rank ^ 1) - here;
    Planner<Main, Extra, Feed::kPeers> planner{args, smem};
    planner.start();
    const uint32_t slot = smem_address(smem.raw[warp][0]);
    RowPlaces<Feed::kPeers> places;
    Source source = planner.next(places, warp);
    load_first(places, source);
    copy_second(slot, places, source);
    for (uint32_t tile = 0; source != Source::kNone; ++tile) {
      const int buffer = Storage::buffer_of(tile);
      const uint32_t free = Storage::parity_of(tile) ^ 1;
      const Target target{smem_address(smem.keys[buffer][0]),
                          smem_address(&smem.keys_full[buffer][0]), peer_less};
      uint32_t columns[kUnitPieces][8];
      convert_first(columns, source);
      uint4 rope_now[kUnits] = {rope[0], rope[1]};
      const Source next = planner.next(places, warp);
      load_first(places, next);
      mbarrier_wait(smem_address(&smem.keys_empty[buffer][quarter_of(0)]), free);
      store_unit<Main>(target, offsets, columns, quarter_of(0));
      send(target, quarter_of(0));
      convert_second(columns, rope_now[1], slot, source);
      mbarrier_wait(smem_address(&smem.keys_empty[buffer][quarter_of(1)]), free);
      store_unit<Main>(target, offsets, columns, quarter_of(1));
      if constexpr (kRope) {
        // Where probabilities lay, which are read with the last tokens.
        mbarrier_wait(smem_address(&smem.keys_empty[buffer][kQuarters - 1]), free);
#pragma unroll
        for (int unit = 0; unit < kUnits; ++unit) {
          store_rope<T, Main>(target, rope_now[unit], quarter_of(unit));
        }
      }
      send(target, quarter_of(1));
      if (threadIdx.x % 32 == 0) {
        if (warp == 0)
          mbarrier_arrive_expect(target.full, Storage::kChunks * kChunkBytes / 2);
        else
          mbarrier_arrive(target.full);
      }
      copy_second(slot, places, next);
      source = next;
    }
  }
};

}  // namespace flashmla::sm90::sparse::wide
