// The converting warpgroup of a block by itself. Each of its warps has four rows of each quarter of
// a tile, a unit, and brings them by asynchronous copies into a ring of its own; from there they go
// through registers to 16-bit rows. A unit is converted before its place in the buffer is free.
#pragma once

#include "sm90/ptx/barrier.cuh"
#include "sm90/ptx/copy_async.cuh"
#include "sm90/sparse_decode/wide/plan.cuh"
#include "sm90/sparse_decode/wide/target.cuh"

namespace flashmla::sm90::sparse::wide {

template <typename T, typename Main, typename Extra>
struct RingConverter {
  using Storage = SharedStorage<Main, Extra, Feed::kRing>;
  static constexpr bool kSame = std::is_same_v<Main, Extra>;
  static constexpr int kShift = kSharedShift<Main>;

  Storage& smem;
  Planner<Main, Extra, Feed::kRing> planner;
  RowPlace place{};  // of the tile whose units are issued
  Source issued_source = Source::kMain;
  uint32_t issued = 0, consumed = 0;  // units
  uint32_t issue_slot = 0, slot = 0;

  __device__ __forceinline__ uint32_t raw(uint32_t slot) const {
    return smem_address(smem.raw[planner.warp()][slot]);
  }

  // Eight lanes copy a row.
  template <typename Format>
  __device__ __forceinline__ void copy_unit() {
    const int lane = planner.lane(), row = lane / 8;
    const int owner = issued % kQuarters * kUnitRows + row;
    const auto of_owner = [&](const uint8_t* p) {
      return reinterpret_cast<const uint8_t*>(
          __shfl_sync(~0u, reinterpret_cast<uint64_t>(p), owner));
    };
    const uint32_t slot = raw(issue_slot), at = lane % 8 * 16;
    const uint32_t target = slot + row * Format::kRowBytes + at;
    const uint8_t* source = of_owner(place.row) + at;
#pragma unroll
    for (int byte = 0; byte < Format::kRowBytes; byte += 128) {
      if (byte + at < Format::kRowBytes) copy_16(target + byte, source + byte);
    }
    if constexpr (Format::kTwoPlanes) {
      const uint8_t* scales = of_owner(place.scales);
      const uint32_t plane = slot + kUnitRows * Format::kRowBytes;
      if (lane % 8 == 0) copy_8(plane + row * Format::kScaleBytes, scales);
    }
  }

  // Issues copies as far as there is room. A group of copies for each slot, perhaps an empty one.
  __device__ __forceinline__ void refill() {
#pragma unroll 1
    for (; issued - consumed < Storage::kSlots; ++issued) {
      if (issued % kQuarters == 0 && issued_source != Source::kNone) {
        issued_source = planner.next(place);
      }
      if (kSame ? issued_source != Source::kNone : issued_source == Source::kMain)
        copy_unit<Main>();
      else if (!kSame && issued_source == Source::kExtra)
        copy_unit<Extra>();
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
    PieceOffsets<kShift> offsets;
    offsets.find();
    const Target<1> target{smem_address(smem.keys[0][0]), smem_address(&smem.keys_full[0]), 0};
    planner.start();
    refill();
    for (uint32_t tile = 0;; ++tile) {
      const Source source = smem.plan[tile % kPlans].source[planner.warp()];
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
        Mend mend;
        if (kSame || source == Source::kMain) {
          const SharedRows<Main, kShift> rows{raw(slot)};
          load_unit<Main>(unit, rows);
          if constexpr (!RopeUnit<Main>::kNone) RopeUnit<Main>::load(rope, rows);
          mend = convert_unit<T, Main, kShift>(columns, unit);
        } else {
          load_unit<Extra>(unit, SharedRows<Extra, kShift>{raw(slot)});
          mend = convert_unit<T, Extra, kShift>(columns, unit);
        }
        ++consumed;
        if (++slot == Storage::kSlots) slot = 0;
        mbarrier_wait(smem_address(&smem.keys_empty[0][quarter]), tile & 1 ^ 1);
        store_unit<Main>(target, offsets, columns, mend, quarter);
        if constexpr (!RopeUnit<Main>::kNone) {
          RopeUnit<Main>::template store<T>(target, rope, first_token(quarter));
        }
      }
      fence_async_proxy();
      __syncwarp();
      if (planner.lane() == 0) mbarrier_arrive(target.full);
      refill();
    }
  }
};

}  // namespace flashmla::sm90::sparse::wide
