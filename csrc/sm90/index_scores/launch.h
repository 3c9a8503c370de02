#pragma once

#include <cuda_runtime_api.h>

#include "params/index_scores.h"
#include "status.h"

namespace flashmla::sm90 {

Status run_index_scores(const IndexScoresParams& params, cudaStream_t stream);

// Scores some query tokens of every sequence. scores [b, queries, max_blocks * 64]; fill: with -inf
// in the tiles that no query sees, which index_topk has no need of.
Status run_index_scores_of(const IndexScoresParams& params, int first_query, int queries, bool fill,
                           float* scores, cudaStream_t stream);

}  // namespace flashmla::sm90
