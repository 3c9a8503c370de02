// Filling the rings of raw rows: by the score warps of a block by itself, each for one converting
// warp, while products with a tile's keys go on.
#pragma once

#include "sm90/ptx/barrier.cuh"
#include "sm90/ptx/copy_async.cuh"
#include "sm90/sparse_decode/wide/rows.cuh"

namespace flashmla::sm90::sparse::wide {

template <typename Main, typename Extra>
struct RingFeeder {
  using Storage = SharedStorage<Main, Extra, Feed::kRing>;

  Storage& smem;
  Planner<Main, Extra, Feed::kRing> planner;
  const int warp = warp_of_four();
  RowPlaces places{};  // of the tile whose units are issued
  Source source = Source::kMain;
  uint32_t issued = 0, slot = 0;  // units, and the next one's place

  template <typename Format>
  __device__ __forceinline__ void issue() {
    constexpr uint32_t kHalf = kQuarters / kLaneTokens;
    const RowPlace place = issued % kQuarters < kHalf ? places[0] : places[1];
    const UnitPlaces<Format> unit(place, issued % kHalf * kQuarterTokens, warp);
    copy_unit<Format>(smem_address(smem.raw[warp][slot]), unit);
    copy_rope<Format>(smem_address(smem.raw[warp][slot]), unit);
  }

  // Issues the part's first `units` units, as far as it has them.
  __device__ __forceinline__ void fill(uint32_t units) {
#pragma unroll 1
    for (; issued < units && source != Source::kNone; ++issued) {
      if (issued % kQuarters == 0) {
        source = planner.next(places, warp);
        if (source == Source::kNone) return;
      }
      if (std::is_same_v<Main, Extra> || source == Source::kMain)
        issue<Main>();
      else
        issue<Extra>();
      mbarrier_arrive_after_copies(smem_address(&smem.raw_full[slot]));
      if (++slot == Storage::kSlots) slot = 0;
    }
  }
};

// Of score warps that fill no ring.
template <typename Main, typename Extra, Feed kFeed>
struct NoFeeder {
  SharedStorage<Main, Extra, kFeed>& smem;
  Planner<Main, Extra, kFeed> planner;
};

template <typename Main, typename Extra, Feed kFeed>
using FeederOf = std::conditional_t<kFeed == Feed::kRing, RingFeeder<Main, Extra>,
                                    NoFeeder<Main, Extra, kFeed>>;

}  // namespace flashmla::sm90::sparse::wide
