#pragma once

#include <cuda_runtime_api.h>

#include "params/exchange.h"
#include "status.h"

namespace flashmla::sm90 {

Status run_exchange(const ExchangeParams& params, cudaStream_t stream);

}  // namespace flashmla::sm90
