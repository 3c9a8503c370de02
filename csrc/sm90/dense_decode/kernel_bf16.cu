#include "kernel.cuh"
#include "kernel_decl.h"

namespace flashmla::sm90 {

Status launch_dense_decode_bf16(const KernelArgs& args, int boxes, dim3 grid, cudaStream_t stream) {
  return launch_dense_decode<__nv_bfloat16>(args, boxes, grid, stream);
}

}  // namespace flashmla::sm90
