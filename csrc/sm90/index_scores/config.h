// Sizes that the index_scores kernel's roles share, and its arguments.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "params/index_scores.h"
#include "schedule/pieces.h"

namespace flashmla::sm90::index_scores {

constexpr int kTileTokens = kIndexBlockSize;  // a tile is a cache block
static_assert(kTileTokens == kSplitTile);
constexpr int kCodeBytes = kTileTokens * kIndexColumns;
constexpr int kScaleBytes = kTileTokens * 4;
constexpr int kStages = 8;  // tiles of the ring: 68 KB; more on their way slow HBM down

constexpr int kWarpgroupThreads = 128;
constexpr int kWarps = kWarpgroupThreads / 32;  // of a warpgroup
constexpr int kWarpgroups = 2;                  // that score, a tile each in turn
constexpr int kScoringWarps = kWarpgroups * kWarps;
// A slot is always the same warpgroup's: else one could wait for a phase while the other's before
// it has not begun, which parities cannot tell from the one before that.
static_assert(kStages % kWarpgroups == 0);
// And a warp that loads. With N = 256 a whole warpgroup, whose registers the others take.
template <int kN>
constexpr int kThreads = kN == 256 ? (kScoringWarps + kWarps) * 32 : (kScoringWarps + 1) * 32;
constexpr int kScoringRegisters = 232, kLoadingRegisters = 40;  // then: 2 x 232 + 40 = 3 x 168

struct KernelArgs {
  CUtensorMap key_map;    // (128, 64 tokens, blocks, 1)
  CUtensorMap query_map;  // (128 bytes' columns, heads, b * s_q, 1 or 2 such halves)
  const uint8_t* blocks;
  const int32_t* first_block;
  const int32_t* block_table;
  const int32_t* cache_seqlens;
  const float* weights;
  const int32_t* cuts;
  float* scores;  // [b, queries, max_blocks * 64]
  int64_t block_bytes;
  int64_t last_first_block;  // the largest first block that keeps the layer within the array
  uint64_t key_hint;
  uint32_t layer_blocks;
  int max_blocks;
  int b, s_q, heads;
  int first_query, queries;  // the query tokens to be scored: all, or some of every sequence's s_q
  int chunk_tiles;           // keys of an item of work; 0: work is divided by the cuts
  bool causal;
  bool fill;  // scores of tiles that no query sees, too

  __device__ int clamp_length(int length) const {
    return min(max(length, 0), max_blocks * kTileTokens);
  }
  // Tokens that query `query` of s_q sees, none if negative.
  __device__ int seen_tokens(int length, int query) const {
    return causal ? length - (s_q - 1 - query) : length;
  }
};

}  // namespace flashmla::sm90::index_scores
