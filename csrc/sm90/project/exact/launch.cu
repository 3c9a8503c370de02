#include "sm90/project/exact/launch.h"

#include "sm90/host/launch.h"
#include "sm90/project/exact/kernel.cuh"

namespace flashmla::sm90::project::exact {
namespace {

template <class Element>
Status launch_typed(const ProjectParams& params, cudaStream_t stream) {
  const unsigned columns = (params.exact_n + kColumns - 1) / kColumns;
  const unsigned rows = (params.rows + kRows - 1) / kRows;
  LaunchOptions options{dim3(kSplits, columns, params.groups * rows), kThreads};
  options.cluster = kSplits;
  options.dependent = true;
  return launch(project_exact_kernel<Element>, options, stream, "project", params);
}

}  // namespace

Status launch_exact(const ProjectParams& params, cudaStream_t stream) {
  return params.dtype == DType::kBFloat16 ? launch_typed<BFloat16>(params, stream)
                                          : launch_typed<Float16>(params, stream);
}

}  // namespace flashmla::sm90::project::exact
