#pragma once

#include <cuda_runtime_api.h>

#include "params/latent_append.h"
#include "status.h"

namespace flashmla::sm90 {

Status run_latent_append(const LatentAppendParams& params, cudaStream_t stream);

}  // namespace flashmla::sm90
