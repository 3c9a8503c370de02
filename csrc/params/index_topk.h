// What index_topk is given. As index_scores.h says: extents have been checked, values have not.
#pragma once

#include <algorithm>

#include "params/index_scores.h"

namespace flashmla {

constexpr int kMaxTopk = 4096;

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
  void* workspace;     // [index_topk_workspace_bytes]
};

constexpr int64_t kIndexTopkScoreBytes = int64_t{32} << 20;

// Query tokens of each sequence whose scores are in the workspace at once: as many as fit
// kIndexTopkScoreBytes, in eights, and at least 8.
constexpr int64_t index_topk_queries(const IndexTopkParams& params) {
  const int64_t bytes = int64_t{params.b} * params.keys.max_blocks * kIndexBlockSize * 4;
  const int64_t fit = kIndexTopkScoreBytes / std::max<int64_t>(bytes, 1) / 8 * 8;
  return std::min<int64_t>(params.s_q, std::max<int64_t>(fit, 8));
}

// Of scores [b, index_topk_queries, max_blocks * 64] f32. workspace_bytes in
// jax_flashmla/ops/index_topk.py says the same.
constexpr int64_t index_topk_workspace_bytes(const IndexTopkParams& params) {
  if (params.scores != nullptr) return 1;
  return params.b * index_topk_queries(params) * params.keys.max_blocks * kIndexBlockSize * 4;
}

}  // namespace flashmla
