// The kernels' instantiations, without the kernels: a kernel_<format>.cu each.
#pragma once

#include <cuda_runtime_api.h>

#include "sm90/dense_decode/fp8/config.h"
#include "status.h"

namespace flashmla::sm90::dense_decode::fp8 {

// tile_rows: query rows that a thread block has at most. grid: (row tiles, num_parts).
Status launch_v32(const KernelArgs& args, int tile_rows, dim3 grid, cudaStream_t stream);
Status launch_fp8_row(const KernelArgs& args, int tile_rows, dim3 grid, cudaStream_t stream);

}  // namespace flashmla::sm90::dense_decode::fp8
