// The kernels' instantiations, without the kernels: a kernel_<name>.cu each. Those that are given
// what query tokens see are kernels of their own: a branch in the others costs small problems up to
// a tenth of their time.
#pragma once

#include <cuda_runtime_api.h>

#include "params/dense_decode.h"
#include "sm90/dense_decode/config.h"
#include "status.h"

namespace flashmla::sm90::dense_decode {

struct Variant {
  int tile_rows;  // query rows that a thread block has at most
  int boxes;      // cache blocks that a tile spans: 1, 2 or 4
};

Status launch_bf16(const KernelArgs& args, Variant variant, dim3 grid, cudaStream_t stream);
Status launch_f16(const KernelArgs& args, Variant variant, dim3 grid, cudaStream_t stream);
Status launch_bf16_given(const KernelArgs& args, Variant variant, dim3 grid, cudaStream_t stream);
Status launch_f16_given(const KernelArgs& args, Variant variant, dim3 grid, cudaStream_t stream);

}  // namespace flashmla::sm90::dense_decode
