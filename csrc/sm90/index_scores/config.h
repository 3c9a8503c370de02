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

constexpr int kWarpgroupThreads = 128;
constexpr int kWarps = kWarpgroupThreads / 32;  // of a warpgroup

// Roles and sizes for a product of N columns.
template <bool kFp8, int kN>
struct Plan {
  // Scoring warpgroups, which take tiles in turn. While one multiplies, ordinary instructions of
  // the others take up to three times as long: where registers allow it, wide products have three.
  static constexpr int kWarpgroups = kFp8 && kN == 128 ? 3 : 2;
  static constexpr int kScoringWarps = kWarpgroups * kWarps;
  // Products that a tile's is computed as, so that one can be weighed during the other.
  static constexpr int kParts = kN == 256 ? 2 : 1;
  // With 128 accumulators a thread, the loading warp stands for a warpgroup, whose registers the
  // others take.
  static constexpr bool kMovesRegisters = kN == 256;
  // One for each scoring warpgroup, as two threads that start copies read HBM faster than one; but
  // with N = 256 there is time for one's.
  static constexpr int kLoadingWarps = kMovesRegisters ? 1 : kWarpgroups;
  static constexpr int kThreads = (kScoringWarps + (kMovesRegisters ? kWarps : kLoadingWarps)) * 32;
  // Blocks of a multiprocessor that share a part's tiles, where their registers allow it.
  static constexpr int kBlocks = kFp8 && kN <= 64 ? 2 : 1;
  // Tiles on their way, of a multiprocessor about eight, 68 KB: more slow HBM down.
  static constexpr int kStages = kWarpgroups == 3 ? 9 : 8 / kBlocks;
  // A slot is always the same warpgroup's: else one could wait for a phase while the other's before
  // it has not begun, which parities cannot tell from the one before that.
  static_assert(kStages % kWarpgroups == 0);
};
constexpr int kScoringRegisters = 224, kLoadingRegisters = 56;  // then: 2 x 224 + 56 = 3 x 168

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
