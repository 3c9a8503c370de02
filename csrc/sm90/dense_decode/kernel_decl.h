// The kernel's instantiations, without the kernel: a kernel_<dtype>.cu each. boxes: cache blocks
// that a tile spans, 1, 2 or 4.
#pragma once

#include <cuda_runtime_api.h>

#include "../../params.h"
#include "../../status.h"
#include "config.h"

namespace flashmla::sm90 {

Status launch_dense_decode_bf16(const KernelArgs& args, int boxes, dim3 grid, cudaStream_t stream);
Status launch_dense_decode_f16(const KernelArgs& args, int boxes, dim3 grid, cudaStream_t stream);

}  // namespace flashmla::sm90
