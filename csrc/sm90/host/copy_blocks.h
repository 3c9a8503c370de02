// Blocks that an append writes into a buffer of their own.
#pragma once

#include <cuda_runtime_api.h>

#include "params/cache_append.h"
#include "sm90/host/launch.h"

namespace flashmla::sm90 {

// Whether the append's result is a buffer of its own, which gets the blocks first.
inline bool needs_copy(const CacheAppendParams& cache) { return cache.updated != cache.blocks; }

inline Status copy_blocks(const CacheAppendParams& cache, cudaStream_t stream, const char* name) {
  if (!needs_copy(cache)) return Status::Ok();
  const int64_t bytes = cache.num_blocks * cache.block_bytes;
  return to_status(
      cudaMemcpyAsync(cache.updated, cache.blocks, bytes, cudaMemcpyDeviceToDevice, stream), name);
}

}  // namespace flashmla::sm90
