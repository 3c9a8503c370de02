#pragma once

#include "cpu/parallel_for.h"
#include "params/project.h"
#include "status.h"

namespace flashmla::cpu {

// Products of a few rows with weights that are read once.
Status run_project(const ProjectParams& params, const ParallelFor& parallel_for);

}  // namespace flashmla::cpu
