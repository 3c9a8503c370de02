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

// Query tokens of one sequence, at most kQueryGroup.
struct QueryGroup {
  int sequence;
  int query;  // the first of the sequence's s_q
  int size;
};

// Scores of the tokens [begin, end), which begin at a block, at scores[i * stride + token].
void score_tokens(const IndexScoresParams& params, const QueryGroup& group, int64_t begin,
                  int64_t end, float* scores, int64_t stride) {
  static thread_local IndexQueries queries;
  const auto visible_to = [&](int i) {
    return visible_tokens(params.keys, group.sequence, params.s_q, params.causal, group.query + i);
  };
  const int64_t seen = visible_to(group.size - 1);  // by any
  if (seen > begin) {
    queries.load(params, int64_t{group.sequence} * params.s_q + group.query, group.size);
  }
  const int32_t* table = table_of(params.keys, group.sequence);
  for (int64_t token = begin; token < end; token += kIndexBlockSize) {
    const int32_t id = table[token / kIndexBlockSize];
    const uint8_t* block = token < seen ? block_of(params.keys, id) : nullptr;
    if (block != nullptr) score_block(queries, block, scores + token, stride);
    for (int i = 0; i < group.size; ++i) {
      const int64_t visible = block == nullptr ? 0 : visible_to(i) - token;
      float* row = scores + i * stride + token;
      std::fill(row + std::clamp<int64_t>(visible, 0, kIndexBlockSize), row + kIndexBlockSize,
                -kInfinity);
    }
  }
}

}  // namespace

void score_queries(const IndexScoresParams& params, int first, int n, int64_t tokens, float* scores,
                   int64_t stride, const ParallelFor& parallel_for) {
  const int groups = (n + kQueryGroup - 1) / kQueryGroup;  // of a sequence
  const int chunks = static_cast<int>((tokens + kTaskTokens - 1) / kTaskTokens);
  parallel_for(params.b * groups * chunks, [&](int task) {
    QueryGroup group;
    group.sequence = task / chunks / groups;
    const int offset = task / chunks % groups * kQueryGroup;
    group.query = first + offset;
    group.size = std::min(n - offset, kQueryGroup);
    const int64_t begin = task % chunks * kTaskTokens;
    float* rows = scores + (int64_t{group.sequence} * n + offset) * stride;
    score_tokens(params, group, begin, std::min(begin + kTaskTokens, tokens), rows, stride);
  });
}

Status run_index_scores(const IndexScoresParams& params, const ParallelFor& parallel_for) {
  const int64_t tokens = int64_t{params.keys.max_blocks} * kIndexBlockSize;
  score_queries(params, 0, params.s_q, tokens, params.scores, tokens, parallel_for);
  return Status::Ok();
}

}  // namespace flashmla::cpu
