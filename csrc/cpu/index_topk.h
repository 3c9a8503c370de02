#pragma once

#include "cpu/parallel_for.h"
#include "params/index_topk.h"
#include "status.h"

namespace flashmla::cpu {

// Cuts are not used, as by index_scores.
Status run_index_topk(const IndexTopkParams& params, const ParallelFor& parallel_for);

}  // namespace flashmla::cpu
