#pragma once

#include <cuda_runtime_api.h>

#include "params/project_twice.h"
#include "status.h"

namespace flashmla::sm90 {

Status run_project_twice(const ProjectTwiceParams& params, cudaStream_t stream);

}  // namespace flashmla::sm90
