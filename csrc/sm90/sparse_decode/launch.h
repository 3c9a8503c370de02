#pragma once

#include <cuda_runtime_api.h>

#include "params/sparse_decode.h"
#include "status.h"

namespace flashmla::sm90 {

Status run_sparse_decode(const SparseDecodeParams& params, cudaStream_t stream);

}  // namespace flashmla::sm90
