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
constexpr int kWarpgroups = 2;                  // that score, a tile each in turn
constexpr int kScoringWarps = kWarpgroups * kWarps;
// And warps that load, one for each warpgroup: two threads that start copies read HBM faster than
// one. With N = 256 one, for whose loads there is time; its warpgroup's registers the others take.
template <int kN>
constexpr int kLoadingWarps = kN == 256 ? 1 : kWarpgroups;
template <int kN>
constexpr int kThreads = (kScoringWarps + (kN == 256 ? kWarps : kLoadingWarps<kN>)) * 32;
// Blocks of a multiprocessor that share a part's tiles where their registers allow it.
constexpr int kMostBlocks = 2;
constexpr int blocks_of(bool fp8, int n) { return fp8 && n <= 64 ? kMostBlocks : 1; }
// Tiles of a multiprocessor's rings: 68 KB; more on their way slow HBM down.
constexpr int kTilesInFlight = 8;
constexpr int stages_of(bool fp8, int n) { return kTilesInFlight / blocks_of(fp8, n); }
// A slot is always the same warpgroup's: else one could wait for a phase while the other's before
// it has not begun, which parities cannot tell from the one before that.
static_assert(stages_of(true, 64) % kWarpgroups == 0 && kTilesInFlight % kWarpgroups == 0);
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
