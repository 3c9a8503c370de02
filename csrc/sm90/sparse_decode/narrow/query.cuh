// The queries of a piece, by the score warpgroup: out of the ring, scaled, to where products read
// them.
#pragma once

#include "sm90/attention/partial.cuh"
#include "sm90/ptx/barrier.cuh"
#include "sm90/ptx/matrix.cuh"
#include "sm90/sparse_decode/narrow/shared_storage.cuh"

namespace flashmla::sm90::sparse::narrow {

// The power of two by which a tile's queries are divided, so that their largest is just within f16.
// All its items are in the ring. Infinities and NaN do not count.
template <typename Format, int kRows>
__device__ __forceinline__ int find_query_exponent(SharedStorage<Format, kRows>& smem, int count,
                                                   RingPosition<kStages> ring) {
  constexpr int kUnits = Format::kHeadDim / 8;  // of a head: 16 bytes each
  constexpr int kItemHeads = kSlotHeads<kRows> * kTileSlots;
  const int thread = reread_thread();
  uint32_t peak = 0;
#pragma unroll 1
  for (int item = 0; item < kQueryItems; ++item) {
#pragma unroll
    for (int slot = 0; slot < kTileSlots; ++slot) {
      mbarrier_wait(smem_address(&smem.full[ring.stage][slot]), ring.parity);
    }
    const int heads = min(count - item * kItemHeads, kItemHeads);
#pragma unroll 4
    for (int i = thread; i < heads * kUnits; i += kWarpgroupThreads) {
      const int head = i / kUnits;
      const uint4 v = load_shared(smem_address(smem.ring[ring.stage][head / kSlotHeads<kRows>]) +
                                  (head % kSlotHeads<kRows> * kUnits + i % kUnits) * 16);
      const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint32_t magnitude = words[j] & 0x7fff7fff;
        peak = __vmaxu2(peak, magnitude & __vcmpltu2(magnitude, 0x7f807f80));
      }
    }
    ring.advance();
  }
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) {
    peak = __vmaxu2(peak, __shfl_xor_sync(~0u, peak, lane));
  }
  if (thread % 32 == 0) smem.query_peak[thread / 32] = peak;
  named_barrier_sync(kScoreBarrier, kWarpgroupThreads);
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) peak = __vmaxu2(peak, smem.query_peak[warp]);
  const int exponent = int(max(peak & 0xffff, peak >> 16) >> 7) - 127;
  return min(max(exponent - 14, -100), 112);
}

// Four pairs of bf16 queries, times a power of two, in f16 or bf16.
template <typename T>
__device__ __forceinline__ uint4 scale_queries(uint4 v, float factor) {
  uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    words[j] = pack<T>(__uint_as_float(words[j] << 16) * factor,
                       __uint_as_float(words[j] & 0xffff0000) * factor);
  }
  return {words[0], words[1], words[2], words[3]};
}

// Takes a piece's queries out of the ring, times `factor`: the latent columns in f16, the rope in
// bf16. Latent columns are permuted within each sixteen as convert_keys permutes the keys': column
// pair 2t to place t, 2t + 1 to t + 4.
template <typename Format, int kRows>
__device__ __forceinline__ void take_query(SharedStorage<Format, kRows>& smem, int count,
                                           float factor, RingPosition<kStages>& ring) {
  constexpr int kUnits = Format::kHeadDim / 16;  // of a head: 32 bytes each
  constexpr int kItemHeads = kSlotHeads<kRows> * kTileSlots;
  const int thread = reread_thread();
#pragma unroll 1
  for (int item = 0; item < kQueryItems; ++item) {
    for (int i = thread; i < kItemHeads * kUnits; i += kWarpgroupThreads) {
      const int head = i / kUnits, unit = i % kUnits;
      const int row = item * kItemHeads + head;
      const uint32_t source = smem_address(smem.ring[ring.stage][head / kSlotHeads<kRows>]) +
                              (head % kSlotHeads<kRows> * kUnits + unit) * 32;
      uint4 low = {}, high = {};
      if (row < count) {
        low = load_shared(source);
        high = load_shared(source + 16);
      }
      const uint32_t target = smem_address(smem.query[unit / 4]);
      if (Format::kRope && unit / 4 == Format::kHeadDim / kChunkColumns - 1) {
        low = scale_queries<__nv_bfloat16>(low, factor);
        high = scale_queries<__nv_bfloat16>(high, factor);
      } else {
        const uint4 even = {low.x, low.z, high.x, high.z}, odd = {low.y, low.w, high.y, high.w};
        low = scale_queries<__half>(even, factor);
        high = scale_queries<__half>(odd, factor);
      }
      store_shared(target + swizzled_offset(row, unit % 4 * 2), low);
      store_shared(target + swizzled_offset(row, unit % 4 * 2 + 1), high);
    }
    // On behalf of the value warps, for which queries are not.
    __syncwarp();
    if (thread % 32 < kValueWarps / kWarps) {
#pragma unroll
      for (int slot = 0; slot < kTileSlots; ++slot) {
        mbarrier_arrive(smem_address(&smem.empty[ring.stage][slot]));
      }
    }
    ring.advance();
  }
  fence_async_proxy();
  named_barrier_sync(kScoreBarrier, kWarpgroupThreads);
}

}  // namespace flashmla::sm90::sparse::narrow
