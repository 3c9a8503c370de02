#pragma once

#include <cuda_runtime_api.h>

#include "params/index_scores.h"
#include "status.h"

namespace flashmla::sm90 {

Status run_index_scores(const IndexScoresParams& params, cudaStream_t stream);

}  // namespace flashmla::sm90
