#pragma once

#include "cpu/parallel_for.h"
#include "params/sparse_prefill.h"
#include "status.h"

namespace flashmla::cpu {

// Attention over the rows that indices name, any dimensions.
Status run_sparse_prefill(const SparsePrefillParams& params, const ParallelFor& parallel_for);

}  // namespace flashmla::cpu
