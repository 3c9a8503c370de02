// What the value warpgroups of both kernels do around their products.
#pragma once

#include "sm90/dense_decode/config.h"
#include "sm90/ptx/matrix.cuh"
#include "sm90/ptx/smem_desc.cuh"
#include "sm90/ptx/thread.cuh"

namespace flashmla::sm90::dense_decode {

// Rows of the tile past the sequence may hold NaN, and 0 * NaN is NaN.
__device__ __forceinline__ void zero_tail(uint8_t* half, int valid_tokens) {
  const int thread = threadIdx.x % kWarpgroupThreads;
  for (int i = valid_tokens * 8 + thread; i < kTileTokens * 8; i += kWarpgroupThreads) {
    const int group = i / 64, piece = i % 64;  // eight tokens, and a 16-byte piece of a chunk
#pragma unroll
    for (int c = 0; c < kHalfChunks; ++c) {
      store_shared(smem_address(half) + group * kTokenGroupBytes + c * kGroupBytes + piece * 16,
                   uint4{0, 0, 0, 0});
    }
  }
}

// Element offset of a column of row `row` of sequence or workspace slot `index`. The number of rows
// fits 32 bits.
__device__ __forceinline__ uint64_t output_offset(const KernelArgs& args, int index, int row,
                                                  int column) {
  return uint64_t{static_cast<uint32_t>(index * args.rows + row)} * kValueDim + column;
}

}  // namespace flashmla::sm90::dense_decode
