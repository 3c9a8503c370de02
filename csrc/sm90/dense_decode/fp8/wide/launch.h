// Launching the wide kernel over v32 rows.
#pragma once

#include <cuda_runtime_api.h>

#include "params/dense_decode.h"
#include "sm90/dense_decode/fp8/config.h"
#include "status.h"

namespace flashmla::sm90::dense_decode::fp8::wide {

// args: what both fp8 kernels are given. grid: (row tiles of up to tile_rows, num_parts).
Status launch(const DenseDecodeParams& params, const KernelArgs& args, int tile_rows, dim3 grid,
              cudaStream_t stream);

}  // namespace flashmla::sm90::dense_decode::fp8::wide
