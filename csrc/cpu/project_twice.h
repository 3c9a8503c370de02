#pragma once

#include "cpu/parallel_for.h"
#include "params/project_twice.h"
#include "status.h"

namespace flashmla::cpu {

Status run_project_twice(const ProjectTwiceParams& params, const ParallelFor& parallel_for);

}  // namespace flashmla::cpu
