// The converting warpgroup of a block by itself. Each of its warps has 128 columns of each quarter
// of a tile, a unit, in a ring of its own, which a score warp fills; from there they go through
// registers to 16-bit rows. Two units are converted before their places in the buffer are free.
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
  const PieceOffsets offsets = PieceOffsets::of(warp);
  uint32_t slot = 0, round = 0;  // of the ring: the next unit's

  // The slot of a tile's unit `unit`, if `first` is that of its first one.
  __device__ __forceinline__ uint32_t raw(uint32_t first, int unit) const {
    const uint32_t at = first + unit;
    return smem_address(smem.raw[warp][at < Storage::kSlots ? at : at - Storage::kSlots]);
  }

  // The next unit.
  __device__ __forceinline__ void convert(Columns& columns, Source source) {
    const uint32_t from = smem_address(smem.raw[warp][slot]);
    RawUnit unit;
    mbarrier_wait(smem_address(&smem.raw_full[slot]), round & 1);
    if (kSame || source == Source::kMain) {
      read_unit<Main>(unit, from);
      convert_unit<T, Main>(columns, unit);
    } else {
      read_unit<Extra>(unit, from);
      convert_unit<T, Extra>(columns, unit);
    }
    if (++slot == Storage::kSlots) slot = 0, ++round;
  }

  __device__ __forceinline__ void store(const Columns& columns, uint32_t first, int quarter,
                                        uint32_t free) const {
    const Target<1> target{smem_address(smem.keys[0][0]), smem_address(&smem.keys_full[0]), 0};
    mbarrier_wait(smem_address(&smem.keys_empty[0][quarter]), free);
    store_unit<Main>(target, offsets, columns, quarter);
    if constexpr (!RopeUnit<Main>::kNone) {
      uint4 rope;
      read_rope<Main>(rope, raw(first, quarter));
      store_rope<T, Main>(target, rope, quarter);
    }
  }

  __device__ __forceinline__ void run(const sparse::KernelArgs& args) {
    TileWalk walk;
    walk.enter(args, smem.end, smem.begin.sequence, smem.begin.tile);
    for (uint32_t tile = 0; walk.source() != Source::kNone; ++tile) {
      const Source source = walk.source();
      const uint32_t first = slot, free = tile & 1 ^ 1;
      Columns even, odd;
      convert(even, source);
      convert(odd, source);
      walk.advance(args, smem.end);
      store(even, first, 0, free);
      convert(even, source);
      store(odd, first, 1, free);
      convert(odd, source);
      store(even, first, 2, free);
      store(odd, first, 3, free);
      fence_async_proxy();
      __syncwarp();
      if (threadIdx.x % 32 == 0) mbarrier_arrive(smem_address(&smem.keys_full[0]));
    }
  }
};

}  // namespace flashmla::sm90::sparse::wide
