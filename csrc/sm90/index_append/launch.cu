#include "sm90/index_append/launch.h"

#include <cstdint>

#include "sm90/host/copy_blocks.h"
#include "sm90/host/launch.h"
#include "sm90/index_append/kernel.cuh"

namespace flashmla::sm90 {
namespace {

template <class Element>
Status launch_rows(const IndexAppendParams& params, cudaStream_t stream) {
  using index_append::kWarps;
  const auto tokens = static_cast<unsigned>(params.cache.b * params.cache.s_new);
  const dim3 grid(tokens, static_cast<unsigned>(params.heads / kWarps + 1));
  const bool whole = params.columns % index_append::kWidth == 0;
  return launch(index_append::index_append_kernel<Element>, {grid, index_append::kThreads}, stream,
                "index_append", params, whole);
}

}  // namespace

Status run_index_append(const IndexAppendParams& params, cudaStream_t stream) {
  const CacheAppendParams& cache = params.cache;
  const Status copied = copy_blocks(cache, stream, "index_append");
  if (!copied.ok()) return copied;
  switch (cache.rows_dtype) {
    case DType::kBFloat16:
      return launch_rows<BFloat16>(params, stream);
    case DType::kFloat16:
      return launch_rows<Float16>(params, stream);
    case DType::kFloat32:
      return launch_rows<Float32>(params, stream);
  }
  return Status::Internal("index_append: unknown dtype of projected");
}

}  // namespace flashmla::sm90
