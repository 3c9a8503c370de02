#include "kernel.cuh"
#include "kernel_decl.h"

namespace flashmla::sm90 {

Status launch_dense_decode_f16(const KernelArgs& args, dim3 grid, cudaStream_t stream) {
  return launch(dense_decode_kernel<__half>,
                {grid, kThreads, sizeof(SharedStorage), /*dependent=*/true}, stream, "dense_decode",
                args);
}

}  // namespace flashmla::sm90
