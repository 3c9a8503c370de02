#include "cpu/index_topk.h"

#include <algorithm>
#include <cstdint>
#include <memory>

#include "cpu/index/select.h"
#include "cpu/index/visible.h"
#include "cpu/index_scores.h"
#include "elements.h"

namespace flashmla::cpu {
namespace {

constexpr int64_t kScoresAtATime = int64_t{1} << 24;  // 64 MiB; at least a query group's

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

// Selects for query token `query` of b * s_q.
void select_query(const IndexTopkParams& params, int64_t query, const float* scores) {
  static thread_local Selection selection;
  const int sequence = static_cast<int>(query / params.s_q);
  const int64_t visible = visible_tokens(params.keys, sequence, params.s_q, params.causal,
                                         static_cast<int>(query % params.s_q));
  load_keys(params, sequence, scores, visible, selection.keys);
  selection.select(params.topk);

  const int32_t* table = table_of(params.keys, sequence);
  int32_t* indices = params.indices + query * params.topk;
  int32_t* positions = params.positions + query * params.topk;
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
  if (params.scores != nullptr) {
    const int64_t stride = int64_t{params.keys.max_blocks} * kIndexBlockSize;
    parallel_for(params.b * params.s_q,
                 [&](int query) { select_query(params, query, params.scores + query * stride); });
    return Status::Ok();
  }

  int64_t stride = 1;  // the longest sequence's tokens, in whole blocks
  for (int i = 0; i < params.b; ++i) stride = std::max(stride, seqlen_of(params.keys, i));
  stride = (stride + kIndexBlockSize - 1) / kIndexBlockSize * kIndexBlockSize;
  const IndexScoresParams scoring = scores_params(params);
  const int num_groups = num_query_groups(scoring);
  const int64_t group_size = query_group(scoring, 0).size;  // no group is larger
  const auto at_a_time =
      static_cast<int>(std::clamp<int64_t>(kScoresAtATime / (stride * group_size), 1, num_groups));
  const std::unique_ptr<float[]> scores(new float[at_a_time * group_size * stride]);
  for (int begin = 0; begin < num_groups; begin += at_a_time) {
    const int end = std::min(begin + at_a_time, num_groups);
    score_groups(scoring, begin, end, scores.get(), stride, parallel_for);
    const QueryGroup last = query_group(scoring, end - 1);
    const int64_t first = query_group(scoring, begin).first;
    parallel_for(static_cast<int>(last.first + last.size - first),
                 [&](int i) { select_query(params, first + i, scores.get() + i * stride); });
  }
  return Status::Ok();
}

}  // namespace flashmla::cpu
