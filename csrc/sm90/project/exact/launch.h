#pragma once

#include <cuda_runtime_api.h>

#include "params/project.h"
#include "status.h"

namespace flashmla::sm90::project::exact {

// The products with params.exact_w, beside whatever the stream's last kernel does: x was there
// before that.
Status launch_exact(const ProjectParams& params, cudaStream_t stream);

}  // namespace flashmla::sm90::project::exact
