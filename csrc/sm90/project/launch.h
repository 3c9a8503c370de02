#pragma once

#include <cuda_runtime_api.h>

#include "params/project.h"
#include "status.h"

namespace flashmla::sm90 {

// dependent: x, alone of its operands, is made by the previous kernel of the stream, and this one
// may start before that one has ended.
Status run_project(const ProjectParams& params, cudaStream_t stream, bool dependent);
Status run_project(const ProjectParams& params, cudaStream_t stream);

}  // namespace flashmla::sm90
