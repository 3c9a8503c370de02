// The kernel's instantiations, without the kernel: a kernel_<dtype>.cu each.
#pragma once

#include <cuda_runtime_api.h>

#include "sm90/sparse_prefill/config.h"
#include "status.h"

namespace flashmla::sm90::sparse_prefill {

// T: of queries, rows and outputs.
template <typename T, int kHeadDim>
Status launch_kernel(const KernelArgs& args, dim3 grid, cudaStream_t stream);

}  // namespace flashmla::sm90::sparse_prefill
