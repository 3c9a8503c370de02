#include "sm90/dense_decode/kernels.cuh"

namespace flashmla::sm90::dense_decode {

Status launch_f16_given(const KernelArgs& args, Variant variant, dim3 grid, cudaStream_t stream) {
  return launch_variant<__half, /*kGiven=*/true>(args, variant, grid, stream);
}

}  // namespace flashmla::sm90::dense_decode
