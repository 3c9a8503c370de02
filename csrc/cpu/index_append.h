#pragma once

#include "cpu/parallel_for.h"
#include "params/index_append.h"
#include "status.h"

namespace flashmla::cpu {

// Appends each new token's index key, and quantises its index queries.
Status run_index_append(const IndexAppendParams& params, const ParallelFor& parallel_for);

}  // namespace flashmla::cpu
