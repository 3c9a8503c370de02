#include "sm90/project_twice/launch.h"

#include "sm90/project/launch.h"

namespace flashmla::sm90 {

// The second kernel asks for its first weights while the first one runs.
Status run_project_twice(const ProjectTwiceParams& params, cudaStream_t stream) {
  if (Status status = run_project(params.first, stream); !status.ok()) return status;
  return run_project(params.second, stream, /*dependent=*/true);
}

}  // namespace flashmla::sm90
