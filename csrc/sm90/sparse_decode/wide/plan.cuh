// Planning tiles: where their rows are. Each converting warp does it for its own rows, four of each
// quarter of a tile, one a lane.
#pragma once

#include "sm90/sparse_decode/wide/work.cuh"

namespace flashmla::sm90::sparse::wide {

// Where a lane's row is.
struct RowPlace {
  const uint8_t* row;
  const uint8_t* scales;  // in the second plane
};

// The part's tiles in order, as one converting warp sees them.
template <typename Main, typename Extra, Feed kFeed>
struct Planner {
  using Storage = SharedStorage<Main, Extra, kFeed>;

  const sparse::KernelArgs& args;
  Storage& smem;
  int query, tile, tile_end;  // the next one; equal where the part is at its end
  QueryTiles tiles;           // of the query token
  uint32_t planned;           // tiles
  int32_t index;              // this lane's of the next tile

  static __device__ __forceinline__ int warp() { return threadIdx.x / 32 % kWarps; }
  static __device__ __forceinline__ int lane() { return threadIdx.x % 32; }
  // The lane's token; the upper half of the lanes does what the lower half does.
  static __device__ __forceinline__ int token() {
    return lane() / kUnitRows % kQuarters * kQuarterTokens + warp() * kUnitRows +
           lane() % kUnitRows;
  }

  __device__ __forceinline__ void start() {
    planned = 0;
    enter(smem.begin.sequence, smem.begin.tile);
    fetch();
  }

  // Plans the next tile, if there is one.
  __device__ __forceinline__ Source next(RowPlace& place) {
    auto& plan = smem.plan[planned % kPlans];
    const Source source = tile >= tile_end     ? Source::kNone
                          : tile >= tiles.main ? Source::kExtra
                                               : Source::kMain;
    if (lane() == 0) plan.source[warp()] = source;
    if (source != Source::kNone) {
      place = source == Source::kExtra ? find<Extra>(args.extra, smem.layer[1])
                                       : find<Main>(args.main, smem.layer[0]);
      if (++tile >= tile_end) enter(query + 1, 0);
      fetch();
    }
    ++planned;
    __syncwarp();
    return source;
  }

 private:
  // Goes to the first query token from `next` on that has a tile in this part.
  __device__ __forceinline__ void enter(int next, int first_tile) {
    for (query = next; owns_work({0, 0}, smem.end, query); ++query) {
      tiles = QueryTiles::of(args, query);
      tile = query == next ? first_tile : 0;
      tile_end = query == smem.end.sequence ? min(tiles.all, smem.end.tile) : tiles.all;
      if (tile < tile_end) return;
    }
    tile = tile_end = 0;
  }

  __device__ __forceinline__ void fetch() {
    const bool extra = tile >= tiles.main;
    const SourceArgs& source = extra ? args.extra : args.main;
    const int i = (tile - (extra ? tiles.main : 0)) * kTileTokens + token();
    index = -1;
    if (tile < tile_end && i < (extra ? tiles.extra_length : tiles.main_length)) {
      index = __ldg(source.indices + int64_t{query} * source.topk + i);
    }
  }

  template <typename Format>
  __device__ __forceinline__ RowPlace find(const SourceArgs& source, const uint8_t* layer) {
    const bool attended = static_cast<uint32_t>(index) < source.layer_slots;
    const uint32_t block = source.block_of(index);
    const uint32_t offset = static_cast<uint32_t>(index) - block * source.block_size;
    const uint8_t* base = layer + block * source.block_bytes;
    RowPlace place{attended ? base + int64_t{offset} * source.row_bytes : kZeroRow, kZeroRow};
    if (Format::kTwoPlanes && attended) {
      place.scales =
          base + int64_t{source.block_size} * Format::kRowBytes + offset * Format::kScaleBytes;
    }
    const uint32_t all = __ballot_sync(~0u, attended);
    if (lane() == 0) smem.plan[planned % kPlans].attended[warp()] = all;
    return place;
  }
};

// Plans the next tile, for those who load its rows by the plan.
template <typename Main, typename Extra, Feed kFeed>
__device__ __forceinline__ Source plan_rows(Planner<Main, Extra, kFeed>& planner) {
  auto& plan = planner.smem.plan[planner.planned % kPlans];
  RowPlace place;
  const Source source = planner.next(place);
  if (source != Source::kNone && planner.lane() < kWarpTokens) {
    plan.row[planner.token()] = place.row;
    if constexpr (Main::kTwoPlanes) plan.scales[planner.token()] = place.scales;
  }
  __syncwarp();
  return source;
}

}  // namespace flashmla::sm90::sparse::wide
