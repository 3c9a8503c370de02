// What index_topk is given. As index_scores.h says: extents have been checked, values have not.
#pragma once

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
  void* workspace;     // [index_topk_workspace_bytes], private to an implementation
};

// From the extents alone; workspace_bytes in jax_flashmla/ops/index_topk.py says the same.
constexpr int64_t index_topk_workspace_bytes(const IndexTopkParams&) { return 1; }

}  // namespace flashmla
