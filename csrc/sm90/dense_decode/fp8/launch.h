// Launching the fp8 kernel.
#pragma once

#include <cuda_runtime_api.h>

#include "params/dense_decode.h"
#include "status.h"

namespace flashmla::sm90::dense_decode::fp8 {

// InvalidArgument where the kernel does not take the call's format, dimensions or dtype.
Status check_supported(const DenseDecodeParams& params);

// row_tiles: of tile_rows query rows at most.
Status launch(const DenseDecodeParams& params, int tile_rows, int row_tiles, cudaStream_t stream);

}  // namespace flashmla::sm90::dense_decode::fp8
