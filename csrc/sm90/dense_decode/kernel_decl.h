// The kernel's instantiations, without the kernel: one per kernel_<dtype>.cu.
#pragma once

#include <cuda_runtime_api.h>

#include "../../params.h"
#include "../../status.h"
#include "config.h"

namespace flashmla::sm90 {

Status launch_dense_decode_bf16(const KernelArgs& args, dim3 grid, cudaStream_t stream);
Status launch_dense_decode_f16(const KernelArgs& args, dim3 grid, cudaStream_t stream);

}  // namespace flashmla::sm90
