#include "kernel.cuh"
#include "kernel_decl.h"

namespace flashmla::sm90 {

Status launch_dense_decode_f16(const KernelArgs& args, int boxes, dim3 grid, cudaStream_t stream) {
  return launch_dense_decode<__half>(args, boxes, grid, stream);
}

}  // namespace flashmla::sm90
