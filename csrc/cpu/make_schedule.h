#pragma once

#include "cpu/parallel_for.h"
#include "params/make_schedule.h"
#include "status.h"

namespace flashmla::cpu {

// Fills cuts as schedule/plan.h defines them.
Status run_make_schedule(const MakeScheduleParams& params, const ParallelFor& parallel_for);

}  // namespace flashmla::cpu
