#include "kernel.cuh"
#include "kernel_decl.h"

namespace flashmla::sm90 {

Status launch_dense_decode_bf16(const KernelArgs& args, dim3 grid, cudaStream_t stream) {
  return launch(dense_decode_kernel<__nv_bfloat16>,
                {grid, kThreads, sizeof(SharedStorage), /*dependent=*/true}, stream, "dense_decode",
                args);
}

}  // namespace flashmla::sm90
