#include "sm90/dense_decode/fp8/kernel.cuh"
#include "sm90/dense_decode/fp8/kernels.h"

namespace flashmla::sm90::dense_decode::fp8 {

Status launch_v32(const KernelArgs& args, int tile_rows, dim3 grid, cudaStream_t stream) {
  return launch_format<V32>(args, tile_rows, grid, stream);
}

}  // namespace flashmla::sm90::dense_decode::fp8
