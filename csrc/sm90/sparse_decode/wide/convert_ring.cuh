// The converting warpgroup of a block by itself. Each of its warps has sixteen rows of each tile,
// and brings them by asynchronous copies two tiles ahead. From its slot they go through registers
// to 16-bit rows, a unit of 128 columns at a time: the scores follow unit by unit. Two units are
// converted before their place in the buffer is free.
#pragma once

#include "sm90/ptx/barrier.cuh"
#include "sm90/sparse_decode/wide/whole_rows.cuh"

namespace flashmla::sm90::sparse::wide {

template <typename T, typename Main, typename Extra>
struct RingConverter {
  using Storage = SharedStorage<Main, Extra, Feed::kRing>;
  static constexpr bool kSame = std::is_same_v<Main, Extra>;
  static constexpr bool kTail = RowsBytes<Main>::kTail;
  // Of a tile's four times four rows, that are brought first.
  static constexpr int kBroughtFirst = Storage::kRope ? 2 : 3;

  Storage& smem;
  Planner<Main, Extra, Feed::kRing> planner;
  const int warp = warp_of_four();
  RowPlaces<Feed::kRing> places{};  // of the tile that is brought
  uint32_t sources = 0;  // two bits each of the last tiles that were planned, by tile % kPlans

  // Of the warp's, in a chunk.
  __device__ __forceinline__ uint32_t first_row() const {
    return warp * (kQuarterTokens * kChunkRowBytes);
  }
  __device__ __forceinline__ uint32_t slot_of(uint32_t tile) const {
    return smem_address(smem.raw[warp][tile % Storage::kSlots]);
  }
  __device__ __forceinline__ uint32_t rope_of(uint32_t tile) const {
    return smem_address(smem.rope[0]) + tile % Storage::kSlots * kChunkBytes + first_row();
  }
  static __device__ __forceinline__ uint32_t shift_of(uint32_t tile) { return tile % kPlans * 2; }
  __device__ __forceinline__ Source source_of(uint32_t tile) const {
    return static_cast<Source>(sources >> shift_of(tile) & 3);
  }

  // Calls with(Format) if the tile is one of them.
  template <typename With>
  static __device__ __forceinline__ void with_format(Source source, With with) {
    if (kSame ? source != Source::kNone : source == Source::kMain)
      with(Main{});
    else if (!kSame && source == Source::kExtra)
      with(Extra{});
  }

  // Issues a tile's first copies, when its slot has been read. What is not there past the part's
  // last tile is an empty group of copies.
  __device__ __forceinline__ void bring(uint32_t tile) {
    const Source source = planner.next(places, warp);
    sources = (sources & ~(3u << shift_of(tile))) | uint32_t(source) << shift_of(tile);
    with_format(source, [&](auto format) {
      copy_codes<decltype(format), 0, kBroughtFirst>(slot_of(tile), places[0]);
    });
    commit_copies();
  }

  // The others, when the scores of the tile before the last have been computed.
  __device__ __forceinline__ void bring_rest(uint32_t tile) {
    with_format(source_of(tile), [&](auto format) {
      copy_codes<decltype(format), kBroughtFirst, kQuarterTokens / 4>(slot_of(tile), places[0]);
      copy_rest<decltype(format)>(slot_of(tile), rope_of(tile), places[0]);
    });
    commit_copies();
  }

  static __device__ __forceinline__ void read(RawUnit& unit, uint32_t slot, int step,
                                              Source source) {
    with_format(source,
                [&](auto format) { read_group<decltype(format)>(unit, slot, group_of(step)); });
  }
  static __device__ __forceinline__ void convert(uint32_t (&columns)[kUnitPieces][8],
                                                 const RawUnit& unit, int step, Source source) {
    if (kSame || source == Source::kMain)
      convert_unit<T, Main>(columns, unit, group_of(step));
    else
      convert_unit<T, Extra>(columns, unit, group_of(step));
  }

  __device__ __forceinline__ void arrive(int part) const {
    __syncwarp();
    if (planner.lane() == 0) mbarrier_arrive(smem_address(&smem.keys_full[0][part]));
  }

  __device__ __forceinline__ void run() {
    const uint32_t rows = smem_address(smem.keys[0][0]) + first_row();
    const auto offsets = PieceOffsets::of(threadIdx.x % 32, rows);
    planner.start();
    bring(0);
    bring_rest(0);
    bring(1);
    for (uint32_t tile = 0;; ++tile) {
      const Source source = source_of(tile);
      if (source == Source::kNone) break;
      const uint32_t slot = slot_of(tile), free = tile & 1 ^ 1;
      wait_copies<1>();
      __syncwarp();
      RawUnit unit;
      uint32_t ahead[2][kUnitPieces][8];
      read(unit, slot, 0, source);
      finish_rope<T, Main>(rope_of(tile));
      convert(ahead[0], unit, 0, source);
      read(unit, slot, 1, source);
      convert(ahead[1], unit, 1, source);
      // When the softmax is done: copies are in the way of all loads and stores.
      mbarrier_wait(smem_address(&smem.probabilities_stored[0]), free);
      bring_rest(tile + 1);
      // Before the scores start to read, which loads would wait for.
      read(unit, slot, 2, source);
      mbarrier_wait(smem_address(&smem.keys_empty[0][0]), free);
      store_group<Main>(offsets, ahead[0], group_of(0));
      store_group<Main>(offsets, ahead[1], group_of(1));
      arrive(0);
#pragma unroll 1
      for (int step = 2; step < kGroups; ++step) {
        uint32_t columns[kUnitPieces][8];
        convert(columns, unit, step, source);
        if (step + 1 < kGroups)
          read(unit, slot, step + 1, source);
        else if constexpr (kTail)
          read_tail<Main>(unit.codes, slot);
        mbarrier_wait(smem_address(&smem.keys_empty[0][1]), free);
        store_group<Main>(offsets, columns, group_of(step));
        if (kTail && step == kGroups - 1) store_tail<T>(rows, unit.codes);
        arrive(step - 1);
      }
      __syncwarp();  // all have read the slot
      bring(tile + 2);
    }
  }
};

}  // namespace flashmla::sm90::sparse::wide
