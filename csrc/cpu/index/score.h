// Scores of the indexer: the inner work of index_scores and index_topk.
#pragma once

#include <cstdint>
#include <vector>

#include "params/index_scores.h"

namespace flashmla::cpu {

constexpr int kQueryGroup = 8;  // query tokens that share one conversion of a block to float
constexpr int kHeadGroup = 4;   // heads whose products with a block are taken together

// The query tokens of a group, as score_block reads them. It outlives calls: `load` writes all that
// is read, of padding heads too.
struct IndexQueries {
  int num_tokens;
  int head_groups;             // of a token
  std::vector<float> q;        // [num_tokens, head_groups, kIndexColumns, kHeadGroup]
  std::vector<float> weights;  // [num_tokens, head_groups, kHeadGroup] 0 for padding heads

  // Query tokens [first, first + n) of b * s_q.
  void load(const IndexScoresParams& params, int64_t first, int n);
};

// scores[i * stride + t] of the block's token t for the i-th query token, all of them.
void score_block(const IndexQueries& queries, const uint8_t* block, float* scores, int64_t stride);

}  // namespace flashmla::cpu
