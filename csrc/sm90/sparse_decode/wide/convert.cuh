// The converting warpgroup. A tile is four quarters of sixteen tokens, each with a place of its own
// in the tile's buffer that may be free before the others'.
#pragma once

#include "sm90/ptx/barrier.cuh"
#include "sm90/ptx/copy_async.cuh"
#include "sm90/sparse_decode/wide/convert_peers.cuh"
#include "sm90/sparse_decode/wide/convert_ring.cuh"

namespace flashmla::sm90::sparse::wide {

// Copies a tile of rows that are 16-bit already, a warp four rows of each quarter. The copies
// arrive by themselves: the next tile's follow without a wait.
template <typename Storage>
__device__ __forceinline__ void copy_tile(Storage& smem, const RowPlaces<Feed::kCopy>& places,
                                          uint32_t tile) {
  const int buffer = Storage::buffer_of(tile), lane = threadIdx.x % 32;
  const uint32_t keys = smem_address(smem.keys[buffer][0]);
#pragma unroll
  for (int quarter = 0; quarter < kQuarters; ++quarter) {
    const int token = rope_token(quarter) + lane / 8;
    const uint64_t row = __shfl_sync(
        ~0u, reinterpret_cast<uint64_t>(places[quarter * kQuarterTokens / 32].row), token % 32);
    const uint8_t* source = reinterpret_cast<const uint8_t*>(row) + lane % 8 * 16;
    mbarrier_wait(smem_address(&smem.keys_empty[buffer][quarter]), Storage::parity_of(tile) ^ 1);
#pragma unroll
    for (int c = 0; c < kLatentChunks; ++c) {
      copy_16(keys + c * kChunkBytes + swizzled_offset(token, lane % 8),
              source + c * kChunkRowBytes);
    }
  }
  if constexpr (Storage::kRope) {
#pragma unroll
    for (int quarter = 0; quarter < kQuarters; ++quarter) {
      const int token = rope_token(quarter) + lane / 8;
      const uint64_t row = __shfl_sync(
          ~0u, reinterpret_cast<uint64_t>(places[quarter * kQuarterTokens / 32].row), token % 32);
      copy_16(
          keys + kLatentChunks * kChunkBytes + swizzled_offset(token, lane % 8),
          reinterpret_cast<const uint8_t*>(row) + kLatentChunks * kChunkRowBytes + lane % 8 * 16);
    }
  }
  mbarrier_arrive_after_copies(smem_address(&smem.keys_full[buffer][0]));
}

template <typename T, typename Main, typename Extra, Feed kFeed>
__device__ void run_convert(const sparse::KernelArgs& args,
                            SharedStorage<Main, Extra, kFeed>& smem) {
  if constexpr (kFeed == Feed::kCopy) {
    Planner<Main, Extra, kFeed> planner{args, smem};
    const int warp = warp_of_four();
    planner.start();
    RowPlaces<kFeed> places;
    for (uint32_t tile = 0; planner.next(places, warp) != Source::kNone; ++tile) {
      copy_tile(smem, places, tile);
    }
  } else if constexpr (kFeed == Feed::kPeers) {
    PeerConverter<T, Main, Extra> converter;
    converter.run(args, smem);
  } else {
    RingConverter<T, Main, Extra> converter{smem, {args, smem}};
    converter.run();
  }
}

}  // namespace flashmla::sm90::sparse::wide
