#pragma once

#include <cuda_runtime_api.h>

#include "params/project.h"
#include "status.h"

namespace flashmla::sm90 {

Status run_project(const ProjectParams& params, cudaStream_t stream);

}  // namespace flashmla::sm90
