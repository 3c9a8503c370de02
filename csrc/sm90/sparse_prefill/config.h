// Sizes that the sparse prefill kernel's roles share, and its arguments.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "schedule/pieces.h"
#include "sm90/ptx/warpgroup.h"

namespace flashmla::sm90::sparse_prefill {

constexpr int kValueDim = 512;  // d_v: the latent columns; d_qk may have 64 rope columns more
constexpr int kTileRows = 64;   // query heads of a thread block
constexpr int kTileTokens = kSplitTile;
constexpr int kStages = 3;  // tiles in shared memory
constexpr int kLatentChunks = kValueDim / 64;
constexpr int kHalfChunks = 4;  // 256 value columns: what one warpgroup accumulates
constexpr int kChunkRowBytes = 128;
constexpr int kChunkBytes = kTileTokens * kChunkRowBytes;
// A tile's half in shared memory: eight tokens' four chunks, then the next eight tokens'.
constexpr int kTokenGroup = 8;
constexpr int kTokenGroups = kTileTokens / kTokenGroup;
constexpr int kTokenGroupBytes = kHalfChunks * kTokenGroup * kChunkRowBytes;
constexpr int kHalfBytes = kHalfChunks * kChunkBytes;
constexpr int kSharedBase = 1024;  // where dynamic shared memory starts: Hopper reserves 1 KB

// Warpgroups: scores, left values, right values. The latter two gather too: each of their warps the
// tokens of one group.
constexpr int kThreads = 3 * kWarpgroupThreads;
constexpr int kGatherWarps = 2 * kWarpgroupWarps;
static_assert(kGatherWarps == kTokenGroups);
constexpr int kLoadingThread = kWarpgroupThreads;  // of heads
constexpr int kScoreBarrier = 1;                   // named barrier of the score warpgroup
// Registers a thread: together the whole file.
constexpr int kScoreRegisters = 184;  // 124 of the query, 32 of the scores
constexpr int kValueRegisters = 160;  // 128 of the output
static_assert(kScoreRegisters + 2 * kValueRegisters <= 3 * (65536 / kThreads / 8 * 8));

struct KernelArgs {
  // Of `query_box` rows of [s_q * h_q] four latent chunks, or the rope chunk; coordinates 0, row,
  // chunk.
  CUtensorMap query_half_map, query_rope_map;
  // Of sixteen rows of out four chunks; coordinates 0, row, chunk.
  CUtensorMap out_map;
  const uint8_t* kv;
  const int32_t* indices;
  const int32_t* topk_length;  // null: topk
  const float* attn_sink;      // null: none
  void* out;
  float* lse;
  float* max_logits;
  int s_q, h_q, topk;
  uint32_t s_kv;
  int query_box;     // a multiple of eight
  int query_stride;  // from one of a block's query tokens to its next: grid.y
  float sm_scale, scale_log2;

#ifdef __CUDACC__
  // Indices of a query token that count.
  __device__ __forceinline__ int length_of(int query) const {
    if (topk_length == nullptr) return topk;
    return min(max(__ldg(topk_length + query), 0), topk);
  }
#endif
};

}  // namespace flashmla::sm90::sparse_prefill
