#pragma once

#include "cpu/parallel_for.h"
#include "params/latent_append.h"
#include "status.h"

namespace flashmla::cpu {

// Norms, rotates and appends each new row, and norms its query latent.
Status run_latent_append(const LatentAppendParams& params, const ParallelFor& parallel_for);

}  // namespace flashmla::cpu
