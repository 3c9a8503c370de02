#include "cpu/index_scores.h"

#include <algorithm>
#include <cstdint>
#include <limits>

#include "cpu/index/score.h"
#include "cpu/index/visible.h"

namespace flashmla::cpu {
namespace {

constexpr int64_t kTaskTokens = 16 * kIndexBlockSize;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

int64_t visible_to(const IndexScoresParams& params, const QueryGroup& group, int i) {
  return visible_tokens(params.keys, group.sequence, params.s_q, params.causal, group.query + i);
}

// Scores of the tokens [begin, end), which begin at a block, at scores[i * stride + token].
void score_tokens(const IndexScoresParams& params, const QueryGroup& group, int64_t begin,
                  int64_t end, float* scores, int64_t stride) {
  static thread_local IndexQueries queries;
  const int64_t seen = std::min(visible_to(params, group, group.size - 1), end);  // by any
  if (seen > begin) queries.load(params, group.first, group.size);
  const int32_t* table = table_of(params.keys, group.sequence);
  for (int64_t token = begin; token < end; token += kIndexBlockSize) {
    const int64_t last = std::min(token + kIndexBlockSize, end);
    const uint8_t* block =
        token < seen ? block_of(params.keys, table[token / kIndexBlockSize]) : nullptr;
    if (block != nullptr) score_block(queries, block, scores + token, stride);
    for (int i = 0; i < group.size; ++i) {
      const int64_t visible = block == nullptr ? token : visible_to(params, group, i);
      float* row = scores + i * stride;
      std::fill(row + std::clamp(visible, token, last), row + last, -kInfinity);
    }
  }
}

}  // namespace

int num_query_groups(const IndexScoresParams& params) {
  return params.b * ((params.s_q + kQueryGroup - 1) / kQueryGroup);
}

QueryGroup query_group(const IndexScoresParams& params, int index) {
  const int per_sequence = (params.s_q + kQueryGroup - 1) / kQueryGroup;
  QueryGroup group;
  group.sequence = index / per_sequence;
  group.query = index % per_sequence * kQueryGroup;
  group.size = std::min(params.s_q - group.query, kQueryGroup);
  group.first = int64_t{group.sequence} * params.s_q + group.query;
  return group;
}

void score_groups(const IndexScoresParams& params, int begin, int end, float* scores,
                  int64_t stride, const ParallelFor& parallel_for) {
  const int chunks = static_cast<int>((stride + kTaskTokens - 1) / kTaskTokens);
  const int64_t origin = query_group(params, begin).first;
  parallel_for((end - begin) * chunks, [&](int task) {
    const QueryGroup group = query_group(params, begin + task / chunks);
    const int64_t token = task % chunks * kTaskTokens;
    score_tokens(params, group, token, std::min(token + kTaskTokens, stride),
                 scores + (group.first - origin) * stride, stride);
  });
}

Status run_index_scores(const IndexScoresParams& params, const ParallelFor& parallel_for) {
  score_groups(params, 0, num_query_groups(params), params.scores,
               int64_t{params.keys.max_blocks} * kIndexBlockSize, parallel_for);
  return Status::Ok();
}

}  // namespace flashmla::cpu
