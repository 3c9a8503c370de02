// The kernels' instantiations, without the kernels: a kernel_<type of queries>.cu each.
#pragma once

#include <cuda_runtime_api.h>

#include "sm90/index_scores/config.h"
#include "status.h"

namespace flashmla::sm90::index_scores {

struct Variant {
  int heads;    // of a query token, padded: 32 or 64
  int queries;  // query tokens of a product
};

// The columns of a product, heads * queries, are at most 256; 128 with bf16 queries, whose rows
// are twice as long.
constexpr int max_queries(bool fp8, int heads) { return (fp8 ? 256 : 128) / heads; }

Status launch_fp8(const KernelArgs& args, Variant variant, dim3 grid, cudaStream_t stream);
Status launch_bf16(const KernelArgs& args, Variant variant, dim3 grid, cudaStream_t stream);

}  // namespace flashmla::sm90::index_scores
