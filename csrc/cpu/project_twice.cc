#include "cpu/project_twice.h"

#include "cpu/project.h"

namespace flashmla::cpu {

Status run_project_twice(const ProjectTwiceParams& params, const ParallelFor& parallel_for) {
  if (Status status = run_project(params.first, parallel_for); !status.ok()) return status;
  return run_project(params.second, parallel_for);
}

}  // namespace flashmla::cpu
