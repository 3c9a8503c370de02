#pragma once

#include <cuda_runtime_api.h>

#include "params/dense_decode.h"
#include "status.h"

namespace flashmla::sm90 {

Status run_dense_decode(const DenseDecodeParams& params, cudaStream_t stream);

}  // namespace flashmla::sm90
