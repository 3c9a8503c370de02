#pragma once

#include "cpu/parallel_for.h"
#include "params/index_scores.h"
#include "status.h"

namespace flashmla::cpu {

// Cuts are not used: work is divided by blocks of tokens.
Status run_index_scores(const IndexScoresParams& params, const ParallelFor& parallel_for);

// Scores of each sequence's query tokens [first, first + n) and leading `tokens` tokens, whole
// blocks: at scores[(sequence * n + query - first) * stride + token], -inf where not visible.
void score_queries(const IndexScoresParams& params, int first, int n, int64_t tokens, float* scores,
                   int64_t stride, const ParallelFor& parallel_for);

}  // namespace flashmla::cpu
