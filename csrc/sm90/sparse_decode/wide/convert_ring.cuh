// The converting warpgroup of a block by itself. Each of its warps has 128 columns of each quarter
// of a tile, a unit, and brings them by asynchronous copies into a ring of its own; from there they
// go through registers to 16-bit rows. A unit is converted before its place in the buffer is free.
#pragma once

#include "sm90/ptx/barrier.cuh"
#include "sm90/ptx/copy_async.cuh"
#include "sm90/sparse_decode/wide/rows.cuh"
#include "sm90/sparse_decode/wide/target.cuh"

namespace flashmla::sm90::sparse::wide {

template <typename T, typename Main, typename Extra>
struct RingConverter {
  using Storage = SharedStorage<Main, Extra, Feed::kRing>;
  static constexpr bool kSame = std::is_same_v<Main, Extra>;

  Storage& smem;
  Planner<Main, Extra, Feed::kRing> planner;
  const int warp = warp_of_four();
  RowPlaces places{};  // of the tile whose units are issued
  Source issued_source = Source::kMain;
  uint32_t sources = 0;  // two bits each of the last tiles that were planned, by tile % kPlans
  uint32_t issued = 0, consumed = 0;  // units
  uint32_t issue_slot = 0, slot = 0;

  __device__ __forceinline__ uint32_t raw(uint32_t slot) const {
    return smem_address(smem.raw[warp][slot]);
  }

  static __device__ __forceinline__ uint32_t shift_of(uint32_t tile) { return tile % kPlans * 2; }
  __device__ __forceinline__ Source source_of(uint32_t tile) const {
    return static_cast<Source>(sources >> shift_of(tile) & 3);
  }

  template <typename Format>
  __device__ __forceinline__ void issue(uint32_t quarter) {
    const RowPlace place = quarter < kQuarters / kLaneTokens ? places[0] : places[1];
    const UnitPlaces<Format> unit(place, quarter % (kQuarters / kLaneTokens) * kQuarterTokens,
                                  warp);
    copy_unit<Format>(raw(issue_slot), unit);
    copy_rope<Format>(raw(issue_slot), unit);
  }

  // Issues copies as far as there is room. A group of copies for each slot, perhaps an empty one.
  __device__ __forceinline__ void refill() {
#pragma unroll 1
    for (; issued - consumed < Storage::kSlots; ++issued) {
      const uint32_t quarter = issued % kQuarters, tile = issued / kQuarters;
      if (quarter == 0 && issued_source != Source::kNone) {
        issued_source = planner.next(places, warp);
        sources = (sources & ~(3u << shift_of(tile))) | uint32_t(issued_source) << shift_of(tile);
      }
      if (kSame ? issued_source != Source::kNone : issued_source == Source::kMain)
        issue<Main>(quarter);
      else if (!kSame && issued_source == Source::kExtra)
        issue<Extra>(quarter);
      commit_copies();
      if (++issue_slot == Storage::kSlots) issue_slot = 0;
    }
  }

  // Waits for the next unit, when the ring was filled `since` units ago.
  template <int kSince>
  __device__ __forceinline__ void wait_unit() const {
    wait_copies<Storage::kSlots - 1 - kSince>();
    __syncwarp();
  }

  __device__ __forceinline__ void run() {
    const PieceOffsets offsets = PieceOffsets::of(threadIdx.x);
    const Target<1> target{smem_address(smem.keys[0][0]), smem_address(&smem.keys_full[0]), 0};
    planner.start();
    refill();
    for (uint32_t tile = 0;; ++tile) {
      const Source source = source_of(tile);
      if (source == Source::kNone) return;
#pragma unroll 1
      for (int quarter = 0; quarter < kQuarters; ++quarter) {
        if (quarter == 0)
          wait_unit<0>();
        else if (quarter == 1)
          wait_unit<1>();
        else if (quarter == 2)
          wait_unit<2>();
        else
          wait_unit<3>();
        RawUnit unit;
        uint4 rope;
        uint32_t columns[kUnitPieces][8];
        if (kSame || source == Source::kMain) {
          read_unit<Main>(unit, raw(slot));
          read_rope<Main>(rope, raw(slot));
          convert_unit<T, Main>(columns, unit);
        } else {
          read_unit<Extra>(unit, raw(slot));
          read_rope<Extra>(rope, raw(slot));
          convert_unit<T, Extra>(columns, unit);
        }
        ++consumed;
        if (++slot == Storage::kSlots) slot = 0;
        mbarrier_wait(smem_address(&smem.keys_empty[0][quarter]), tile & 1 ^ 1);
        store_unit<Main>(target, offsets, columns, quarter);
        if constexpr (!RopeUnit<Main>::kNone) store_rope<T, Main>(target, rope, quarter);
      }
      fence_async_proxy();
      __syncwarp();
      if (planner.lane() == 0) mbarrier_arrive(target.full);
      refill();
    }
  }
};

}  // namespace flashmla::sm90::sparse::wide
