#pragma once

#include <cuda_runtime_api.h>

#include "params/cache_append.h"
#include "status.h"

namespace flashmla::sm90 {

Status run_cache_append(const CacheAppendParams& params, cudaStream_t stream);

}  // namespace flashmla::sm90
