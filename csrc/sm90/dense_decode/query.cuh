// The query tile: 64 rows of 576 columns, seven chunks as wgmma A fragments in registers, two in
// shared memory.
#pragma once

#include "../common/barrier.cuh"
#include "../common/matrix.cuh"
#include "../common/smem_desc.cuh"
#include "config.h"
#include "shared_storage.cuh"

namespace flashmla::sm90 {

using QueryFragments = uint32_t[kQueryChunksInRegisters][4][4];  // chunk, k16 step, A fragment

// Loads the tile of one sequence; rows past the end become zeros. Called by the score warpgroup with
// no wgmma in flight.
template <int kBarrier>
__device__ __forceinline__ void load_query(const KernelArgs& args, SharedStorage& smem, int sequence,
                                           QueryFragments& fragments) {
  const int thread = threadIdx.x % kWarpgroupThreads, lane = thread % 32, warp = thread / 32;
  const int piece = thread % 8;  // of 16 bytes in a chunk's row
  uint4 raw[kChunks][4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = i * 16 + thread / 8;
    const int offset = smem.row_offset[row];
    const auto* source = reinterpret_cast<const uint4*>(args.q) +
                         (int64_t{sequence} * args.s_q * args.h_q + offset) * (kHeadDim / 8) + piece;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      raw[c][i] = offset >= 0 ? __ldg(source + c * 8) : uint4{0, 0, 0, 0};
    }
  }

  // Two chunks at a time pass through the two resident slots to become fragments; the last two stay.
  constexpr int kSlots = kChunks - kQueryChunksInRegisters;
  const uint32_t base = smem_address(smem.query);
  const int fragment_row = warp * 16 + (lane & 15);
#pragma unroll
  for (int first = 0; first < kChunks;) {
    const int count = first < kQueryChunksInRegisters && first + kSlots > kQueryChunksInRegisters
                          ? kQueryChunksInRegisters - first
                          : kSlots;
    named_barrier_sync(kBarrier, kWarpgroupThreads);  // slots are free
#pragma unroll
    for (int j = 0; j < count; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        store_shared(base + j * kChunkBytes + swizzled_offset(i * 16 + thread / 8, piece),
                     raw[first + j][i]);
      }
    }
    if (first < kQueryChunksInRegisters) {
      named_barrier_sync(kBarrier, kWarpgroupThreads);
#pragma unroll
      for (int j = 0; j < count; ++j) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          load_matrix_x4(fragments[first + j][k],
                         base + j * kChunkBytes + swizzled_offset(fragment_row, k * 2 + lane / 16));
        }
      }
    }
    first += count;
  }
  fence_async_proxy();
  named_barrier_sync(kBarrier, kWarpgroupThreads);
}

}  // namespace flashmla::sm90
