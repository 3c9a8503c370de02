// Converting in a block by itself. A warp has 128 columns of each quarter of a tile, a unit, in a
// ring of its own, which a score warp fills; from there they go through registers to 16-bit rows.
// The converting warps have three quarters of a tile, two of which they convert before their places
// in the buffer are free; score warps have the last one.
#pragma once

#include "sm90/ptx/barrier.cuh"
#include "sm90/sparse_decode/wide/rows.cuh"
#include "sm90/sparse_decode/wide/target.cuh"

namespace flashmla::sm90::sparse::wide {

template <typename T, typename Main, typename Extra>
struct RingConverter {
  using Storage = SharedStorage<Main, Extra, Feed::kRing>;
  static constexpr bool kSame = std::is_same_v<Main, Extra>;
  using Columns = uint32_t[kUnitPieces][8];

  Storage& smem;
  const int warp = warp_of_four();

  // Of the part's unit `unit`.
  __device__ __forceinline__ uint32_t raw(uint32_t unit) const {
    return smem_address(smem.raw[warp][unit % Storage::kSlots]);
  }

  template <int kAtOnce = kSame ? kUnitPieces : kLaneRows>
  __device__ __forceinline__ void convert(Columns& columns, uint32_t unit, Source source) const {
    const uint32_t from = raw(unit);
    RawUnit rows;
    mbarrier_wait(smem_address(&smem.raw_full[unit % Storage::kSlots]), unit / Storage::kSlots & 1);
    if (kSame || source == Source::kMain) {
      read_unit<Main>(rows, from);
      convert_unit<T, Main, kAtOnce>(columns, rows);
    } else {
      read_unit<Extra>(rows, from);
      convert_unit<T, Extra, kAtOnce>(columns, rows);
    }
  }

  __device__ __forceinline__ void store(const Columns& columns, uint32_t unit,
                                        const PieceOffsets& offsets) const {
    const Target<1> target{smem_address(smem.keys[0][0]), smem_address(&smem.keys_full[0]), 0};
    const int quarter = unit % kQuarters;
    mbarrier_wait(smem_address(&smem.keys_empty[0][quarter]), unit / kQuarters & 1 ^ 1);
    store_unit<Main>(target, offsets, columns, quarter);
    if constexpr (!RopeUnit<Main>::kNone) {
      uint4 rope;
      read_rope<Main>(rope, raw(unit));
      store_rope<T, Main>(target, rope, quarter);
    }
  }

  // The warp has stored all that it has of a tile.
  __device__ __forceinline__ void arrive() const {
    fence_async_proxy();
    __syncwarp();
    if (threadIdx.x % 32 == 0) mbarrier_arrive(smem_address(&smem.keys_full[0]));
  }

  // What score warps do for a tile.
  __device__ __forceinline__ void convert_last(uint32_t tile, Source source) const {
    const uint32_t unit = tile * kQuarters + kQuarters - 1;
    Columns columns;
    convert<kSame ? kLaneRows : 1>(columns, unit, source);
    store(columns, unit, PieceOffsets::of(reread_thread()));
    arrive();
  }

  // What converting warps do.
  __device__ __forceinline__ void run(const sparse::KernelArgs& args) const {
    const PieceOffsets offsets = PieceOffsets::of(threadIdx.x);
    TileWalk walk;
    walk.enter(args, smem.end, smem.begin.sequence, smem.begin.tile);
    for (uint32_t unit = 0; walk.source() != Source::kNone; unit += kQuarters) {
      const Source source = walk.source();
      Columns even, odd;
      convert(even, unit, source);
      convert(odd, unit + 1, source);
      walk.advance(args, smem.end);
      store(even, unit, offsets);
      convert(even, unit + 2, source);
      store(odd, unit + 1, offsets);
      store(even, unit + 2, offsets);
      arrive();
    }
  }
};

}  // namespace flashmla::sm90::sparse::wide
