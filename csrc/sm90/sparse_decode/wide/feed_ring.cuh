// Filling the rings of raw rows: by the score warps of a block by itself, each for one converting
// warp, while products with a tile's keys go on.
#pragma once

#include "sm90/ptx/barrier.cuh"
#include "sm90/ptx/copy_async.cuh"
#include "sm90/sparse_decode/wide/convert_ring.cuh"
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
  uint32_t issued = 0;   // units
  uint32_t sources = 0;  // of the last tiles that were planned, two bits each, by tile % kPlans

  static __device__ __forceinline__ uint32_t shift_of(uint32_t tile) { return tile % kPlans * 2; }
  __device__ __forceinline__ Source source_of(uint32_t tile) const {
    return static_cast<Source>(sources >> shift_of(tile) & 3);
  }

  template <typename Format>
  __device__ __forceinline__ void issue() {
    constexpr uint32_t kHalf = kQuarters / kLaneTokens;
    const RowPlace place = issued % kQuarters < kHalf ? places[0] : places[1];
    const UnitPlaces<Format> unit(place, issued % kHalf * kQuarterTokens, warp);
    const uint32_t slot = smem_address(smem.raw[warp][issued % Storage::kSlots]);
    copy_unit<Format>(slot, unit);
    copy_rope<Format>(slot, unit);
  }

  // Issues the part's first `units` units, as far as it has them.
  __device__ __forceinline__ void fill(uint32_t units) {
#pragma unroll 1
    for (; issued < units && source != Source::kNone; ++issued) {
      if (issued % kQuarters == 0) {
        const uint32_t shift = shift_of(issued / kQuarters);
        source = planner.next(places, warp);
        sources = (sources & ~(3u << shift)) | static_cast<uint32_t>(source) << shift;
        if (source == Source::kNone) return;
      }
      if (std::is_same_v<Main, Extra> || source == Source::kMain)
        issue<Main>();
      else
        issue<Extra>();
      mbarrier_arrive_after_copies(smem_address(&smem.raw_full[issued % Storage::kSlots]));
    }
  }
};

// What the score warps do beside the scores in a block by itself.
template <typename T, typename Main, typename Extra>
struct RingHelper {
  using Storage = SharedStorage<Main, Extra, Feed::kRing>;

  RingFeeder<Main, Extra> feeder;
  RingConverter<T, Main, Extra> converter;

  __device__ __forceinline__ RingHelper(const sparse::KernelArgs& args, Storage& smem)
      : feeder{smem, {args, smem}}, converter{smem} {}

  __device__ __forceinline__ void start() {
    feeder.planner.start();
    feeder.fill(Storage::kSlots);
    convert(0);
  }

  // While the tile's scores are computed: its rows have been converted, so that their slots may be
  // filled again.
  __device__ __forceinline__ void during_scores(uint32_t tile) {
    feeder.fill((tile + 1) * kQuarters + Storage::kSlots);
  }

  // When the tile's probabilities are stored: the next tile's last quarter.
  __device__ __forceinline__ void during_values(uint32_t tile) { convert(tile + 1); }

 private:
  __device__ __forceinline__ void convert(uint32_t tile) {
    const Source source = feeder.source_of(tile);
    if (source != Source::kNone) converter.convert_last(tile, source);
  }
};

}  // namespace flashmla::sm90::sparse::wide
