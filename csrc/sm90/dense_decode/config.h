// Sizes that the dense decode kernels share, and their arguments.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "schedule/pieces.h"
#include "sm90/ptx/warpgroup.h"

namespace flashmla::sm90::dense_decode {

constexpr int kHeadDim = 576;   // d_qk: the latent columns, then 64 rope columns
constexpr int kValueDim = 512;  // d_v: the latent columns
// Packed query rows (query token x head) of a thread block: at most 64 in the wide kernel; the
// narrow one is built for tiles of 16 and of 32.
constexpr int kTileRows = 64;
constexpr int kNarrowRows = 32;
constexpr int kLeastRows = 16;
// Over fp8 rows, where a problem is not large: the fp8 kernel is built for 16, 32 and 64. Over v32
// the wide one is taken then, with more rows than these.
constexpr int kFewRows = 32;
constexpr int kTileTokens = kSplitTile;
constexpr int kMinBlock = 16, kMaxBlock = 256;      // tokens of a cache block
constexpr int kMaxBoxes = kTileTokens / kMinBlock;  // of a tile: blocks that it may span

constexpr int kChunks = kHeadDim / 64;  // of 64 columns: 0-3 left, 4-7 right, 8 rope
constexpr int kLatentChunks = kChunks - 1;
constexpr int kHalfChunks = 4;  // 256 value columns: what one warpgroup accumulates
constexpr int kChunkRowBytes = 128;
constexpr int kChunkBytes = kTileTokens * kChunkRowBytes;
// A tile's half in shared memory: eight tokens' four chunks, then the next eight tokens'. So a
// box of any multiple of eight tokens is without gaps.
constexpr int kTokenGroup = 8;
constexpr int kTokenGroupBytes = kHalfChunks * kTokenGroup * kChunkRowBytes;
constexpr int kHalfBytes = kHalfChunks * kChunkBytes;
constexpr int kSharedBase = 1024;  // where dynamic shared memory starts: Hopper reserves 1 KB

// Warpgroups that compute: scores, left values, right values.
constexpr int kComputeThreads = 3 * kWarpgroupThreads;
// Named barriers: the score warpgroup's, the left value warpgroup's; the right one has the next.
constexpr int kScoreBarrier = 1;
constexpr int kValueBarrier = 2;

// What one load takes of a row's columns: 256 latent ones, the other 256, or 64 rope columns.
enum class Part { kLeft, kRight, kRope };

struct KernelArgs {
  // A cache box is a tile's tokens, or what of them is in one block; a query box is `query_box`
  // rows. Boxes have kHalfChunks (half) or 1 (rope) chunks.
  // Coordinates: 0, 0, chunk, token / kTokenGroup, block; 0, row of [b, s_q, h_q], chunk, 0, 0.
  CUtensorMap cache_half_map, cache_rope_map;
  CUtensorMap query_half_map, query_rope_map;
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
  int query_box;  // rows loaded for a tile: at least the rows it has
  int heads_per_kv;
  int head_chunks;  // chunks from one KV head's row to the next one's
  int max_blocks, max_tokens;
  int block_shift;      // a cache block is 2^block_shift tiles; 0 also if less than one
  float scale_log2;     // sm_scale * log2(e)
  uint64_t cache_hint;  // L2 policy of cache tiles
  bool causal;
  const int32_t* seen;  // [b, s_q] what each query token sees, of kernels that are given it

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

}  // namespace flashmla::sm90::dense_decode
