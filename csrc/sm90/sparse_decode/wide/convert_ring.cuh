// The converting warpgroup of a block by itself. Each of its warps has 128 columns of each quarter
// of a tile, a unit, in a ring of its own, which a score warp fills; from there they go through
// registers to 16-bit rows. A unit is converted before its place in the buffer is free.
#pragma once

#include "sm90/ptx/barrier.cuh"
#include "sm90/sparse_decode/wide/rows.cuh"
#include "sm90/sparse_decode/wide/target.cuh"

namespace flashmla::sm90::sparse::wide {

template <typename T, typename Main, typename Extra>
__device__ __forceinline__ void convert_ring(const sparse::KernelArgs& args,
                                             SharedStorage<Main, Extra, Feed::kRing>& smem) {
  using Storage = SharedStorage<Main, Extra, Feed::kRing>;
  constexpr bool kSame = std::is_same_v<Main, Extra>;
  const int warp = warp_of_four();
  const PieceOffsets offsets = PieceOffsets::of(warp);
  const Target<1> target{smem_address(smem.keys[0][0]), smem_address(&smem.keys_full[0]), 0};
  uint32_t slot = 0, round = 0;  // of the ring
  TileWalk walk;
  walk.enter(args, smem.end, smem.begin.sequence, smem.begin.tile);
  for (uint32_t tile = 0; walk.source() != Source::kNone; ++tile) {
#pragma unroll 1
    for (int quarter = 0; quarter < kQuarters; ++quarter) {
      const uint32_t raw = smem_address(smem.raw[warp][slot]);
      RawUnit unit;
      uint4 rope;
      uint32_t columns[kUnitPieces][8];
      mbarrier_wait(smem_address(&smem.raw_full[slot]), round & 1);
      if (kSame || walk.source() == Source::kMain) {
        read_unit<Main>(unit, raw);
        read_rope<Main>(rope, raw);
        convert_unit<T, Main>(columns, unit);
      } else {
        read_unit<Extra>(unit, raw);
        read_rope<Extra>(rope, raw);
        convert_unit<T, Extra>(columns, unit);
      }
      if (++slot == Storage::kSlots) slot = 0, ++round;
      mbarrier_wait(smem_address(&smem.keys_empty[0][quarter]), tile & 1 ^ 1);
      store_unit<Main>(target, offsets, columns, quarter);
      if constexpr (!RopeUnit<Main>::kNone) store_rope<T, Main>(target, rope, quarter);
    }
    walk.advance(args, smem.end);
    fence_async_proxy();
    __syncwarp();
    if (threadIdx.x % 32 == 0) mbarrier_arrive(target.full);
  }
}

}  // namespace flashmla::sm90::sparse::wide
