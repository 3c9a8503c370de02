#pragma once

#include <cuda_runtime_api.h>

#include "params/sparse_decode.h"
#include "sm90/sparse_decode/config.h"
#include "status.h"

namespace flashmla::sm90::sparse::wide {

// InvalidArgument for caches that the kernel does not take.
Status launch(const SparseDecodeParams& params, const sparse::KernelArgs& args, int multiprocessors,
              cudaStream_t stream);

}  // namespace flashmla::sm90::sparse::wide
