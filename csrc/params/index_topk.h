// What index_topk is given. As index_scores.h says: extents have been checked, values have not.
#pragma once

#include <algorithm>
#include <cstdint>

#include "params/index_scores.h"

namespace flashmla {

// Of each query token the slots (block id * 64 + offset, by the unshifted table) of the
// min(topk, visible) highest scores, ascending by position, then -1. Of equal scores the earlier
// position wins; -inf and NaN are never selected. Scores are those of index_scores, bit for bit, or
// given.
struct IndexTopkParams {
  int b, s_q, heads;  // heads 0 where scores are given
  int topk;
  int num_parts;
  bool causal;
  bool fp8_queries;

  IndexKeys keys;        // blocks null where scores are given
  const void* q;         // [b, s_q, heads, 128]
  const float* weights;  // [b, s_q, heads]
  const float* scores;   // [b, s_q, max_blocks * 64]; null: computed
  const int32_t* cuts;   // [num_parts + 1, 2]

  int32_t* indices;    // [b, s_q, topk] slots
  int32_t* positions;  // [b, s_q, topk] token positions, -1 behind
  void* workspace;     // private to an implementation
  int64_t workspace_bytes;
};

constexpr int64_t kIndexTopkScoreBytes = int64_t{32} << 20;

// Query tokens of each sequence whose scores are in the workspace at once: as many as fit
// kIndexTopkScoreBytes, so that their selection finds them in L2, but at least 8.
constexpr int index_topk_queries(const IndexTopkParams& params) {
  const int64_t bytes = std::max<int64_t>(int64_t{params.b} * params.keys.max_blocks * 256, 1);
  return static_cast<int>(
      std::min<int64_t>(params.s_q, std::max<int64_t>(kIndexTopkScoreBytes / bytes / 8 * 8, 8)));
}

// ops/index_topk.py says the same.
constexpr int64_t index_topk_workspace_bytes(const IndexTopkParams& params) {
  if (params.heads == 0) return 1;
  return std::max<int64_t>(
      int64_t{params.b} * index_topk_queries(params) * params.keys.max_blocks * 256, 1);
}

}  // namespace flashmla
