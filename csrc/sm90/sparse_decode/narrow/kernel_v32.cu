#include "sm90/sparse_decode/narrow/kernel.cuh"
#include "sm90/sparse_decode/narrow/kernels.h"

namespace flashmla::sm90::sparse::narrow {

Status launch_v32(const KernelArgs& args, int rows, int num_parts, cudaStream_t stream) {
  using T = __nv_bfloat16;
  if (rows == 16) return launch_kernel<T, V32, 16>(args, num_parts, stream);
  if (rows == 32) return launch_kernel<T, V32, 32>(args, num_parts, stream);
  return launch_kernel<T, V32, 64>(args, num_parts, stream);
}

}  // namespace flashmla::sm90::sparse::narrow
