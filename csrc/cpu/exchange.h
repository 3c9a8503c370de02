#pragma once

#include "cpu/parallel_for.h"
#include "params/exchange.h"
#include "status.h"

namespace flashmla::cpu {

// Copies the segments that the CPU devices of a group have for this one.
Status run_exchange(const ExchangeParams& params, const ParallelFor& parallel_for);

}  // namespace flashmla::cpu
