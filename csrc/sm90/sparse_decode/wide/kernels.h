// The wide kernel's instantiations, without the kernel.
#pragma once

#include <cuda_runtime_api.h>

#include "sm90/sparse_decode/wide/config.h"
#include "sm90/sparse_decode/wide/formats.cuh"
#include "status.h"

namespace flashmla::sm90::sparse::wide {

// T: of queries and outputs. pairs: of an even number of head tiles, two share the conversion of
// rows of codes.
template <typename T, typename Main, typename Extra>
Status launch_kernel(const KernelArgs& args, int num_parts, bool pairs, cudaStream_t stream);

}  // namespace flashmla::sm90::sparse::wide
