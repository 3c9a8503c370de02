#include "sm90/index_scores/kernel.cuh"
#include "sm90/index_scores/kernels.h"

namespace flashmla::sm90::index_scores {

Status launch_fp8(const KernelArgs& args, Variant variant, dim3 grid, cudaStream_t stream) {
  if (variant.heads == 32) {
    if (variant.queries == 1) return launch_kernel<true, 32, 1>(args, grid, stream);
    if (variant.queries == 2) return launch_kernel<true, 32, 2>(args, grid, stream);
    if (variant.queries == 4) return launch_kernel<true, 32, 4>(args, grid, stream);
    return launch_kernel<true, 32, 8>(args, grid, stream);
  }
  if (variant.queries == 1) return launch_kernel<true, 64, 1>(args, grid, stream);
  if (variant.queries == 2) return launch_kernel<true, 64, 2>(args, grid, stream);
  return launch_kernel<true, 64, 4>(args, grid, stream);
}

}  // namespace flashmla::sm90::index_scores
