#include "sm90/dense_decode/kernels.cuh"

namespace flashmla::sm90::dense_decode {

Status launch_bf16(const KernelArgs& args, Variant variant, dim3 grid, cudaStream_t stream) {
  return launch_variant<__nv_bfloat16, /*kGiven=*/false>(args, variant, grid, stream);
}

}  // namespace flashmla::sm90::dense_decode
