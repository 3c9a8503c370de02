#pragma once

#include "cpu/parallel_for.h"
#include "params/sparse_decode.h"
#include "status.h"

namespace flashmla::cpu {

// Attention over the rows that indices name, any dimensions, formats and block sizes. Cuts are not
// used: query tokens stay whole.
Status run_sparse_decode(const SparseDecodeParams& params, const ParallelFor& parallel_for);

// The same, and each query row's largest scaled score: max_logits [b, s_q, h_q], natural log, -inf
// where nothing is attended; null: not asked for.
Status attend_sparsely(const SparseDecodeParams& params, float* max_logits,
                       const ParallelFor& parallel_for);

}  // namespace flashmla::cpu
