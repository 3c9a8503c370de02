#pragma once

#include "cpu/parallel_for.h"
#include "params/all_reduce_sum.h"
#include "status.h"

namespace flashmla::cpu {

// Sums x over the CPU devices of a group.
Status run_all_reduce_sum(const AllReduceSumParams& params, const ParallelFor& parallel_for);

}  // namespace flashmla::cpu
