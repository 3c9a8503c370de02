#pragma once

#include <cuda_runtime_api.h>

#include "params/merge.h"
#include "status.h"

namespace flashmla::sm90 {

// Merges the pieces of cut sequences into out and lse. Meant to follow the kernel that wrote them,
// as its programmatic dependent. shares_sm: that kernel's blocks leave room for one of the merge's
// on their multiprocessor.
Status run_merge(const MergeParams& params, bool shares_sm, cudaStream_t stream);

}  // namespace flashmla::sm90
