// The kernel's plan of shared memory.
#pragma once

#include "sm90/index_scores/config.h"
#include "sm90/ptx/smem_desc.cuh"

namespace flashmla::sm90::index_scores {

// Query tokens of one sequence against a run of its tiles.
struct Item {
  int sequence;     // -1: there is no more work
  int first_query;  // of s_q
  int queries;      // up to kQueries
  int seen;         // tokens that the first query sees; if causal the next sees one more
  int tile_begin, tile_end;
};

// kHeads: heads of a query token, padded. A product's N is kHeads * kQueries.
template <bool kFp8, int kHeads, int kQueries>
struct alignas(1024) SharedStorage {
  static constexpr int kN = kHeads * kQueries;
  using Plan = index_scores::Plan<kFp8, kN>;
  static constexpr int kStages = Plan::kStages;
  static constexpr int kHalves = kFp8 ? 1 : 2;  // of a query head's row, 128 bytes each
  static constexpr int kQueryBytes = kHalves * kN * 128;

  uint8_t keys[kStages][kCodeBytes];  // K-major, 128-byte swizzle
  uint8_t queries[2][kQueryBytes];    // [half][query token][head], the same
  float scales[kStages][kTileTokens];
  alignas(16) float weights[2][kN];  // zero where there is no such query or head
  Item items[2];                     // whose queries these are
  int visible[kStages];              // whether the tile's block is in the layer
  uint64_t keys_full[kStages], keys_empty[kStages];
  uint64_t queries_full[2], queries_empty[2];
};

}  // namespace flashmla::sm90::index_scores
