#pragma once

#include <cuda_runtime_api.h>

#include "params/make_schedule.h"
#include "status.h"

namespace flashmla::sm90 {

Status run_make_schedule(const MakeScheduleParams& params, cudaStream_t stream);

}  // namespace flashmla::sm90
