#pragma once

#include <cuda_runtime_api.h>

#include "params/all_reduce_sum.h"
#include "status.h"

namespace flashmla::sm90 {

Status run_all_reduce_sum(const AllReduceSumParams& params, cudaStream_t stream);

}  // namespace flashmla::sm90
