#pragma once

#include "cpu/parallel_for.h"
#include "params/index_scores.h"
#include "status.h"

namespace flashmla::cpu {

// Cuts are not used: work is divided by blocks of tokens.
Status run_index_scores(const IndexScoresParams& params, const ParallelFor& parallel_for);

// Query tokens of b * s_q, of one sequence, of which there are at most kQueryGroup.
struct QueryGroup {
  int sequence, query;  // the first of the s_q
  int size;
  int64_t first;  // of b * s_q
};

int num_query_groups(const IndexScoresParams& params);
QueryGroup query_group(const IndexScoresParams& params, int index);

// Scores of groups [begin, end): of the query token `first` at scores[(first - that of `begin`) *
// stride], for the sequence's leading `stride` tokens, -inf where not visible.
void score_groups(const IndexScoresParams& params, int begin, int end, float* scores,
                  int64_t stride, const ParallelFor& parallel_for);

}  // namespace flashmla::cpu
