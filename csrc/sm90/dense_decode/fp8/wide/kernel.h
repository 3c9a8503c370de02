// The wide kernel, over v32 rows, without its code.
#pragma once

#include <cuda_runtime_api.h>

#include "sm90/dense_decode/fp8/wide/config.h"
#include "status.h"

namespace flashmla::sm90::dense_decode::fp8::wide {

// grid: (row tiles, num_parts).
Status launch_kernel(const WideArgs& args, dim3 grid, cudaStream_t stream);

}  // namespace flashmla::sm90::dense_decode::fp8::wide
