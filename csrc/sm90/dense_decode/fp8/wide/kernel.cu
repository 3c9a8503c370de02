#include "sm90/dense_decode/fp8/wide/kernel.cuh"

#include "sm90/dense_decode/fp8/wide/kernel.h"

namespace flashmla::sm90::dense_decode::fp8::wide {

Status launch_kernel(const WideArgs& args, dim3 grid, cudaStream_t stream) {
  return launch(fp8_wide_kernel, {grid, kWideThreads, sizeof(WideStorage), /*dependent=*/true},
                stream, "dense_decode", args);
}

}  // namespace flashmla::sm90::dense_decode::fp8::wide
