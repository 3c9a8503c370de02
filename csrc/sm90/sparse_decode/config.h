// Sizes that the sparse decode kernel's roles share, and its arguments.
#pragma once

#include <cstdint>

#include "schedule/pieces.h"
#include "sm90/attention/partial.cuh"
#include "sm90/ptx/warpgroup.h"

namespace flashmla::sm90::sparse {

constexpr int kValueDim = 512;  // d_v
constexpr int kTileTokens = kSplitTile;
constexpr int kWarpTokens = 16;      // of a tile, that one score warp has or looks up
constexpr int kChunkRowBytes = 128;  // 64 16-bit columns
constexpr int kSharedBase = 1024;    // where dynamic shared memory starts: Hopper reserves 1 KB

constexpr int kWarps = kWarpgroupWarps;
constexpr int kThreads = 4 * kWarpgroupThreads;

struct SourceArgs {
  const uint8_t* blocks;
  const int32_t* first_block;
  const int32_t* indices;
  const int32_t* topk_length;
  int64_t block_bytes;
  int64_t row_bytes;         // from one row to the next of the first plane
  int64_t last_first_block;  // the largest first block that keeps the layer within the array
  int topk;
  int block_size;
  uint32_t layer_slots;
  uint32_t inverse, shift;  // that divide by block_size (make_divisor); 0 for 1

#ifdef __CUDACC__
  // Of slots below 2^31.
  __device__ __forceinline__ uint32_t block_of(uint32_t slot) const {
    return inverse != 0 ? __umulhi(slot, inverse) >> shift : slot;
  }
#endif
};

struct KernelArgs {
  SourceArgs main;
  SourceArgs extra;  // blocks null where there is none
  const uint8_t* q;
  const float* attn_sink;
  const float* kv_scale;  // of kFp8Row
  const int32_t* cuts;
  void* out;
  float* lse;
  float* out_accum;
  float* lse_accum;
  int queries;  // b * s_q: rows of the schedule
  int h_q;
  float scale_log2;  // sm_scale * log2(e)
};

}  // namespace flashmla::sm90::sparse
