#pragma once

#include <cuda_runtime_api.h>

#include "params/index_append.h"
#include "status.h"

namespace flashmla::sm90 {

Status run_index_append(const IndexAppendParams& params, cudaStream_t stream);

}  // namespace flashmla::sm90
