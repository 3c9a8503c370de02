#pragma once

#include "cpu/parallel_for.h"
#include "params.h"
#include "status.h"

namespace flashmla::cpu {

// Fills cuts as split_schedule.h defines them.
Status run_make_schedule(const MakeScheduleParams& params, const ParallelFor& parallel_for);

}  // namespace flashmla::cpu
