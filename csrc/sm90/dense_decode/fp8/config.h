// Sizes that the fp8 kernel's roles share, and its arguments.
#pragma once

#include <cstdint>

#include "schedule/pieces.h"
#include "sm90/ptx/warpgroup.h"

namespace flashmla::sm90::dense_decode::fp8 {

constexpr int kHeadDim = 576;   // d_qk: the latent columns, then 64 rope columns
constexpr int kValueDim = 512;  // d_v: the latent columns
constexpr int kRopeDim = kHeadDim - kValueDim;
constexpr int kTileTokens = kSplitTile;
constexpr int kWarpTokens = 16;      // of a tile, that a score warp has
constexpr int kChunkRowBytes = 128;  // 64 16-bit columns
constexpr int kSharedBase = 1024;    // where dynamic shared memory starts: Hopper reserves 1 KB
constexpr int kLeastPiece = 8;       // tokens of a piece at least
constexpr int kMaxPieces = kTileTokens / kLeastPiece;  // of a tile

// Two warpgroups for the scores, which take turns at tiles, then two for the values.
constexpr int kWarps = kWarpgroupWarps;
constexpr int kSides = 2;
constexpr int kRoleWarps = kSides * kWarps;
constexpr int kRoleThreads = kRoleWarps * 32;
constexpr int kThreads = 2 * kRoleThreads;
constexpr int kValueTiles = 4;  // 64-column tiles of a value warpgroup
// Named barriers: both score warpgroups', each one's own, both value warpgroups', each one's own,
// each score warpgroup's turn.
constexpr int kPairBarrier = 1, kScoreBarrier = 2, kStoreBarrier = 4, kValueBarrier = 5,
              kTurnBarrier = 7;

struct KernelArgs {
  const uint8_t* blocks;
  const uint8_t* q;
  const float* kv_scale;  // of Fp8Row
  const int32_t* block_table;
  const int32_t* cache_seqlens;
  const int32_t* cuts;
  void* out;
  float* lse;
  float* out_accum;
  float* lse_accum;
  int b;
  int rows;  // query rows of a sequence: s_q * h_q
  int s_q, h_q;
  int block_size, max_blocks, max_tokens;
  int num_blocks;
  int64_t block_bytes;  // from one block to the next
  int piece, pieces;    // tokens that lie together, what divides a block; of a tile
  float scale_log2;     // sm_scale * log2(e)
  uint64_t cache_hint;  // L2 policy of cache tiles
  bool causal;

#ifdef __CUDACC__
  __device__ __forceinline__ int clamp_seqlen(int seqlen) const {
    return min(max(seqlen, 0), max_tokens);
  }

  // The log-sum-exps of a sequence or, if partial, of a workspace slot.
  __device__ __forceinline__ float* lse_rows(int index, bool partial) const {
    return (partial ? lse_accum : lse) + int64_t{index} * rows;
  }
#endif
};

}  // namespace flashmla::sm90::dense_decode::fp8
