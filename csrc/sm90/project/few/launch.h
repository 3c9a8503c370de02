#pragma once

#include <cuda_runtime_api.h>

#include "params/project.h"
#include "status.h"

namespace flashmla::sm90::project::few {

// Whether the kernel for few rows takes the product: up to 4 rows, and k a multiple of 32.
bool takes(const ProjectParams& params);

Status launch_few(const ProjectParams& params, bool dependent, cudaStream_t stream);

}  // namespace flashmla::sm90::project::few
