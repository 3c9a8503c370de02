#include "sm90/sparse_decode/narrow/kernel.cuh"
#include "sm90/sparse_decode/narrow/kernels.h"

namespace flashmla::sm90::sparse::narrow {

Status launch_v32(const KernelArgs& args, int rows, int num_parts, cudaStream_t stream) {
  using T = __nv_bfloat16;
  return rows == 16 ? launch_kernel<T, V32, 16>(args, num_parts, stream)
                    : launch_kernel<T, V32, 32>(args, num_parts, stream);
}

}  // namespace flashmla::sm90::sparse::narrow
