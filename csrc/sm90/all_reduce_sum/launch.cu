#include "sm90/all_reduce_sum/launch.h"

#include <cstdint>

#include "elements.h"
#include "sm90/all_reduce_sum/config.h"
#include "sm90/all_reduce_sum/kernel.cuh"
#include "sm90/host/launch.h"

namespace flashmla::sm90 {
namespace all_reduce_sum {
namespace {

template <class Element, int kSize>
Status launch_rounds(const AllReduceSumParams& params, const Workspace& workspace,
                     const Split& split, cudaStream_t stream) {
  auto kernel = all_reduce_sum_kernel<Element, kSize, false>;
  if constexpr (kSize > 2) {  // of two devices, one round always sends as little
    if (split.two_rounds) kernel = all_reduce_sum_kernel<Element, kSize, true>;
  }
  return launch(kernel, {static_cast<unsigned>(split.blocks), kThreads}, stream, "all_reduce_sum",
                params, workspace, split);
}

template <class Element>
Status launch_size(const AllReduceSumParams& params, const Workspace& workspace, const Split& split,
                   cudaStream_t stream) {
  if (workspace.size == 2) return launch_rounds<Element, 2>(params, workspace, split, stream);
  if (workspace.size <= 4) return launch_rounds<Element, 4>(params, workspace, split, stream);
  return launch_rounds<Element, kMaxPeers>(params, workspace, split, stream);
}

}  // namespace
}  // namespace all_reduce_sum

Status run_all_reduce_sum(const AllReduceSumParams& params, cudaStream_t stream) {
  using namespace all_reduce_sum;
  Workspace workspace;
  Status status = find_workspace("all_reduce_sum", params.group, params.device, &workspace);
  if (!status.ok()) return status;
  const int64_t bytes = params.elements * itemsize(params.dtype);
  if (bytes > kMaxMessageBytes) {
    return Status::InvalidArgument("all_reduce_sum takes at most " +
                                   std::to_string(kMaxMessageBytes) + " bytes, got " +
                                   std::to_string(bytes));
  }
  // Whole vectors of x are read, the last one too, which may end past it.
  if ((reinterpret_cast<uintptr_t>(params.x) | reinterpret_cast<uintptr_t>(params.out)) %
          kVectorBytes !=
      0) {
    return Status::InvalidArgument("all_reduce_sum: x and out must begin at multiples of 16 bytes");
  }
  const Split split = split_message(bytes, workspace.size);
  switch (params.dtype) {
    case DType::kBFloat16:
      return launch_size<BFloat16>(params, workspace, split, stream);
    case DType::kFloat16:
      return launch_size<Float16>(params, workspace, split, stream);
    default:
      return launch_size<Float32>(params, workspace, split, stream);
  }
}

}  // namespace flashmla::sm90
