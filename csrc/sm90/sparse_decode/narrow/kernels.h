// The kernels' instantiations, without the kernels.
#pragma once

#include <cuda_runtime_api.h>

#include "sm90/sparse_decode/config.h"
#include "status.h"

namespace flashmla::sm90::sparse::narrow {

// rows: of a head tile, 16 or 32.
Status launch_v32(const KernelArgs& args, int rows, int num_parts, cudaStream_t stream);

}  // namespace flashmla::sm90::sparse::narrow
