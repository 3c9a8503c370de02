#pragma once

#include "cpu/parallel_for.h"
#include "params/cache_append.h"
#include "status.h"

namespace flashmla::cpu {

// Copies new rows into the blocks of their sequences, in place.
Status run_cache_append(const CacheAppendParams& params, const ParallelFor& parallel_for);

}  // namespace flashmla::cpu
