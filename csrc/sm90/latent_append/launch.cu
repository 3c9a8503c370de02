#include "sm90/latent_append/launch.h"

#include <cstdint>

#include "chained.h"
#include "sm90/host/copy_blocks.h"
#include "sm90/host/launch.h"
#include "sm90/latent_append/kernel.cuh"

namespace flashmla::sm90 {
namespace {

template <class Element, class Stored>
Status launch_rows(const LatentAppendParams& params, cudaStream_t stream, bool dependent) {
  using latent_append::kThreads;
  const CacheAppendParams& cache = params.cache;
  const bool whole =
      ((params.columns | params.q_rank | params.kv_rank) % latent_append::kWidth) == 0;
  const dim3 grid(static_cast<unsigned>(cache.b * cache.s_new), params.q_rank > 0 ? 2 : 1);
  const size_t shared_bytes = (cache.d * sizeof(Stored) + 15) / 16 * 16;
  LaunchOptions options{grid, kThreads, shared_bytes};
  options.dependent = dependent;
  return launch(latent_append::latent_append_kernel<Element, Stored>, options, stream,
                "latent_append", params, layout_of(cache.format), whole);
}

template <class Element>
Status launch_stored(const LatentAppendParams& params, cudaStream_t stream, bool dependent) {
  switch (params.cache.rows_dtype) {
    case DType::kBFloat16:
      return launch_rows<Element, BFloat16>(params, stream, dependent);
    case DType::kFloat16:
      return launch_rows<Element, Float16>(params, stream, dependent);
    case DType::kFloat32:
      return launch_rows<Element, Float32>(params, stream, dependent);
  }
  return Status::Internal("latent_append: unknown dtype of rows");
}

}  // namespace

Status run_latent_append(const LatentAppendParams& params, cudaStream_t stream, bool dependent) {
  const CacheAppendParams& cache = params.cache;
  const Status copied = copy_blocks(cache, stream, "latent_append");
  if (!copied.ok()) return copied;
  // A copy may not be overtaken.
  dependent = dependent && !needs_copy(cache);
  switch (params.dtype) {
    case DType::kBFloat16:
      return launch_stored<BFloat16>(params, stream, dependent);
    case DType::kFloat16:
      return launch_stored<Float16>(params, stream, dependent);
    case DType::kFloat32:
      return launch_stored<Float32>(params, stream, dependent);
  }
  return Status::Internal("latent_append: unknown dtype of projected");
}

Status run_latent_append(const LatentAppendParams& params, cudaStream_t stream) {
  return run_latent_append(params, stream, follows_in_chain);
}

}  // namespace flashmla::sm90
