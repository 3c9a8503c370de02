// Puts the sequences together that dense_decode worked on in more than one piece.
#pragma once

#include <vector>

#include "cpu/parallel_for.h"
#include "params/dense_decode.h"
#include "schedule/pieces.h"

namespace flashmla::cpu {

// From the workspace slots of every cut sequence to out and lse. `cuts` are in order and span the
// batch.
void merge(const DenseDecodeParams& params, const std::vector<Cut>& cuts,
           const ParallelFor& parallel_for);

}  // namespace flashmla::cpu
