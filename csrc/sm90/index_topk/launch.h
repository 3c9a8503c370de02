#pragma once

#include <cuda_runtime_api.h>

#include "params/index_topk.h"
#include "status.h"

namespace flashmla::sm90 {

Status run_index_topk(const IndexTopkParams& params, cudaStream_t stream);

}  // namespace flashmla::sm90
