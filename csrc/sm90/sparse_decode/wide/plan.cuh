// Planning tiles: where their rows are. Each warp that brings rows does it for itself: all of them
// have columns of every row.
#pragma once

#include "sm90/sparse_decode/wide/work.cuh"

namespace flashmla::sm90::sparse::wide {

// Of a tile, that a lane plans: its number's, and 32 on; with a ring, where a warp has a quarter,
// its number's of those sixteen.
template <Feed kFeed>
constexpr int kLaneTokens = kFeed == Feed::kRing ? 1 : kTileTokens / 32;

// Where a lane's tokens are.
struct RowPlace {
  const uint8_t* row;
  int32_t scales;  // in the second plane: how many times eight bytes further
};
template <Feed kFeed>
using RowPlaces = RowPlace[kLaneTokens<kFeed>];

// The part's tiles in order.
struct TileWalk {
  int query, tile, tile_end;  // the next one; equal where the part is at its end
  QueryTiles tiles;           // of the query token

  // Goes to the first query token from `next` on that has a tile in the part, which ends at `end`.
  __device__ __forceinline__ void enter(const sparse::KernelArgs& args, const Cut& end, int next,
                                        int first_tile) {
    for (query = next; owns_work({0, 0}, end, query); ++query) {
      tiles = QueryTiles::of(args, query);
      tile = query == next ? first_tile : 0;
      tile_end = query == end.sequence ? min(tiles.all, end.tile) : tiles.all;
      if (tile < tile_end) return;
    }
    tile = tile_end = 0;
  }

  __device__ __forceinline__ void advance(const sparse::KernelArgs& args, const Cut& end) {
    if (++tile >= tile_end) enter(args, end, query + 1, 0);
  }

  __device__ __forceinline__ Source source() const {
    return tile >= tile_end ? Source::kNone : tile >= tiles.main ? Source::kExtra : Source::kMain;
  }
};

// Plans the part's tiles in order, for one of four warps.
template <typename Main, typename Extra, Feed kFeed>
struct Planner {
  using Storage = SharedStorage<Main, Extra, kFeed>;

  const sparse::KernelArgs& args;
  Storage& smem;
  TileWalk walk;                      // the next tile
  uint32_t planned;                   // tiles
  int32_t index[kLaneTokens<kFeed>];  // this lane's of the next tile

  static __device__ __forceinline__ int lane() { return threadIdx.x % 32; }

  __device__ __forceinline__ void start() {
    planned = 0;
    walk.enter(args, smem.end, smem.begin.sequence, smem.begin.tile);
    fetch();
  }

  // Plans the next tile, if there is one: where its rows are, and for the scores what is attended.
  __device__ __forceinline__ Source next(RowPlaces<kFeed>& places, int warp) {
    const Source source = walk.source();
    if (source == Source::kNone) return source;
    const uint8_t* layer = smem.layer[source == Source::kMain ? 0 : 1];
    uint32_t attended[kLaneTokens<kFeed>];
#pragma unroll
    for (int i = 0; i < kLaneTokens<kFeed>; ++i) {
      bool found;
      if (std::is_same_v<Main, Extra> || source == Source::kMain)
        found = find<Main>(places[i], index[i], source == Source::kMain ? args.main : args.extra,
                           layer);
      else
        found = find<Extra>(places[i], index[i], args.extra, layer);
      attended[i] = __ballot_sync(~0u, found);
    }
    // Addressed by hand: fewer registers.
    const uint32_t words = smem_address(smem.attended[0]) + planned % kPlans * 8;
    if (Storage::kRing && lane() == 0) {
      asm volatile("st.shared.b16 [%0], %1;" ::"r"(words + warp * 2),
                   "h"(static_cast<uint16_t>(attended[0]))
                   : "memory");
    } else if (!Storage::kRing && warp == 0 && lane() == 0) {
      asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(words), "r"(attended[0]),
                   "r"(attended[kLaneTokens<kFeed> - 1])
                   : "memory");
    }
    ++planned;
    walk.advance(args, smem.end);
    fetch();
    return source;
  }

 private:
  __device__ __forceinline__ void fetch() {
    const QueryTiles& tiles = walk.tiles;
    const bool extra = walk.tile >= tiles.main;
    const SourceArgs& source = extra ? args.extra : args.main;
    const int length = walk.source() == Source::kNone ? 0
                       : extra                        ? tiles.extra_length
                                                      : tiles.main_length;
    const int of_tile =
        Storage::kRing ? warp_of_four() * kQuarterTokens + lane() % kQuarterTokens : lane();
    const int first = (walk.tile - (extra ? tiles.main : 0)) * kTileTokens + of_tile;
    const int32_t* indices = source.indices + int64_t{walk.query} * source.topk + first;
#pragma unroll
    for (int i = 0; i < kLaneTokens<kFeed>; ++i) {
      index[i] = -1;
      // Straight to its register: a move of it at a loop's end would wait for it.
      asm volatile(
          "{\n.reg .pred counts;\n"
          "setp.lt.s32 counts, %2, %3;\n"
          "@counts ld.global.nc.b32 %0, [%1];\n}"
          : "+r"(index[i])
          : "l"(indices + 32 * i), "r"(first + 32 * i), "r"(length));
    }
  }

  template <typename Format>
  static __device__ __forceinline__ bool find(RowPlace& place, uint32_t index,
                                              const SourceArgs& source, const uint8_t* layer) {
    const bool attended = index < source.layer_slots;
    const uint32_t block = source.block_of(index);
    const uint32_t offset = index - block * source.block_size;
    const uint8_t* base = layer + block * source.block_bytes;
    const int64_t row_bytes =
        Format::kCodes == Codes::kNone ? source.row_bytes : int64_t{Format::kRowBytes};
    place.row = attended ? base + offset * row_bytes : kZeroRow;
    if constexpr (Format::kTwoPlanes) {
      static_assert(Format::kScaleBytes == 8 && Format::kRowBytes % 8 == 0);
      const int32_t further = source.block_size * (Format::kRowBytes / 8) -
                              static_cast<int32_t>(offset) * (Format::kRowBytes / 8 - 1);
      place.scales = attended ? further : 0;
    }
    return attended;
  }
};

}  // namespace flashmla::sm90::sparse::wide
