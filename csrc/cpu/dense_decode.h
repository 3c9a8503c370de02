#pragma once

#include "cpu/parallel_for.h"
#include "params/dense_decode.h"
#include "status.h"

namespace flashmla::cpu {

// Decode attention over a paged cache, any dimensions and block size. Cuts that were made for other
// lengths, or that no schedule would contain, cost time but do not change what is computed.
Status run_dense_decode(const DenseDecodeParams& params, const ParallelFor& parallel_for);

}  // namespace flashmla::cpu
