#include "sm90/dense_decode/kernels.cuh"

namespace flashmla::sm90::dense_decode {

Status launch_f16(const KernelArgs& args, Variant variant, dim3 grid, cudaStream_t stream) {
  return launch_variant<__half, /*kGiven=*/false>(args, variant, grid, stream);
}

}  // namespace flashmla::sm90::dense_decode
