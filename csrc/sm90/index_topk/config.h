// Sizes that the steps of the index_topk kernel share, and its arguments.
#pragma once

#include <cstdint>

#include "params/index_topk.h"

namespace flashmla::sm90::index_topk {

constexpr int kWarps = 16, kThreads = kWarps * 32;
constexpr int kQuads = 4;  // of scores that may be selected, a thread's
constexpr int kHeldScores = kThreads * kQuads * 4;
constexpr int kSteps = 8;  // of four scores that are compared with a bound, a thread's at once
constexpr int kRoundTokens = kThreads * kSteps * 4;
constexpr int kMaxCluster = 8;    // blocks that share a row; more are not portable
constexpr uint32_t kBins = 2048;  // of a digit: 11 bits

constexpr int kStagedBlocks = 2048;  // of a row, whose ids are in shared memory

// Candidates that a block has room for, and all blocks of a row together may have. Rows that fit
// the registers have none.
constexpr int candidate_room(int topk, int64_t max_tokens) {
  if (max_tokens <= kHeldScores) return 0;
  const int room = (2 * topk + 2048 + 3) / 4 * 4;
  return room < kHeldScores ? room : kHeldScores;
}

struct KernelArgs {
  const float* scores;  // [b, queries, max_tokens]
  const int32_t* block_table;
  const int32_t* cache_seqlens;
  int32_t* indices;    // [b, s_q, topk]
  int32_t* positions;  // [b, s_q, topk]
  int64_t max_tokens;
  uint32_t layer_blocks;
  int max_blocks;
  int s_q, first_query, queries;  // of each sequence those that are selected for
  int topk;
  int room;  // for candidates
  bool causal;
  bool given;  // the scores, not by index_scores: those of blocks outside the layer may be anything
};

}  // namespace flashmla::sm90::index_topk
