#pragma once

#include <cuda_runtime_api.h>

#include "params/sparse_prefill.h"
#include "status.h"

namespace flashmla::sm90 {

Status run_sparse_prefill(const SparsePrefillParams& params, cudaStream_t stream);

}  // namespace flashmla::sm90
