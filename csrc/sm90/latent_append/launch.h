#pragma once

#include <cuda_runtime_api.h>

#include "params/latent_append.h"
#include "status.h"

namespace flashmla::sm90 {

// dependent: `projected` is made by the previous kernel of the stream, before whose end this one
// may start.
Status run_latent_append(const LatentAppendParams& params, cudaStream_t stream, bool dependent);
Status run_latent_append(const LatentAppendParams& params, cudaStream_t stream);

}  // namespace flashmla::sm90
