#pragma once

#include <cuda_runtime_api.h>

#include "../params.h"
#include "../status.h"

namespace flashmla::sm90 {

// Merges the pieces of cut sequences into out and lse. Meant to follow the kernel that wrote them,
// as its programmatic dependent.
Status run_combine(const DenseDecodeParams& params, cudaStream_t stream);

}  // namespace flashmla::sm90
