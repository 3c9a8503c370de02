#include "cpu/index_topk.h"

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/index/select.h"
#include "cpu/index/visible.h"
#include "cpu/index_scores.h"
#include "elements.h"

namespace flashmla::cpu {
namespace {

IndexScoresParams scores_params(const IndexTopkParams& params) {
  return {.b = params.b,
          .s_q = params.s_q,
          .heads = params.heads,
          .num_parts = params.num_parts,
          .causal = params.causal,
          .fp8_queries = params.fp8_queries,
          .keys = params.keys,
          .q = params.q,
          .weights = params.weights,
          .cuts = params.cuts,
          .scores = nullptr};
}

// Selection keys of a query token's visible scores. Of given scores, those of tokens whose block id
// is out of range count as -inf.
void load_keys(const IndexTopkParams& params, int sequence, const float* scores, int64_t visible,
               std::vector<uint32_t>& keys) {
  keys.resize(visible);
  const int32_t* table = table_of(params.keys, sequence);
  for (int64_t token = 0; token < visible; token += kIndexBlockSize) {
    const int64_t end = std::min<int64_t>(token + kIndexBlockSize, visible);
    if (!in_layer(params.keys, table[token / kIndexBlockSize])) {
      std::fill(keys.begin() + token, keys.begin() + end, 0u);
      continue;
    }
    for (int64_t t = token; t < end; ++t) keys[t] = selection_key(bits_of_float(scores[t]));
  }
}

void select_query(const IndexTopkParams& params, int sequence, int query, const float* scores) {
  static thread_local Selection selection;
  const int64_t visible = visible_tokens(params.keys, sequence, params.s_q, params.causal, query);
  load_keys(params, sequence, scores, visible, selection.keys);
  selection.select(params.topk);

  const int32_t* table = table_of(params.keys, sequence);
  const int64_t row = int64_t{sequence} * params.s_q + query;
  int32_t* indices = params.indices + row * params.topk;
  int32_t* positions = params.positions + row * params.topk;
  const auto n = static_cast<int64_t>(selection.positions.size());
  for (int64_t i = 0; i < n; ++i) {
    const int32_t position = selection.positions[i];
    positions[i] = position;
    indices[i] = table[position / kIndexBlockSize] * kIndexBlockSize + position % kIndexBlockSize;
  }
  std::fill(positions + n, positions + params.topk, -1);
  std::fill(indices + n, indices + params.topk, -1);
}

}  // namespace

Status run_index_topk(const IndexTopkParams& params, const ParallelFor& parallel_for) {
  const int64_t stride = int64_t{params.keys.max_blocks} * kIndexBlockSize;
  int64_t longest = 0;
  for (int i = 0; i < params.b; ++i) longest = std::max(longest, seqlen_of(params.keys, i));
  const int64_t tokens = (longest + kIndexBlockSize - 1) / kIndexBlockSize * kIndexBlockSize;

  const bool given = params.scores != nullptr;
  const int at_a_time = given ? params.s_q : static_cast<int>(index_topk_queries(params));
  auto* workspace = static_cast<float*>(params.workspace);
  const float* scores = given ? params.scores : workspace;
  for (int first = 0; first < params.s_q; first += at_a_time) {
    const int n = std::min(params.s_q - first, at_a_time);
    if (!given) {
      score_queries(scores_params(params), first, n, tokens, workspace, stride, parallel_for);
    }
    parallel_for(params.b * n, [&](int row) {
      select_query(params, row / n, first + row % n, scores + row * stride);
    });
  }
  return Status::Ok();
}

}  // namespace flashmla::cpu
