// Tensor maps over the paged cache.
#pragma once

#include <cuda.h>

#include "../../params.h"
#include "../../status.h"

namespace flashmla::sm90 {

// A map whose box is one block's tokens by `chunks` groups of 64 columns, written to shared memory
// group by group in the 128-byte swizzle. Coordinates: 0, token, 64-column group (all KV heads' in a
// row), block id.
Status make_cache_map(const DenseDecodeParams& params, int chunks, CUtensorMap* map);

}  // namespace flashmla::sm90
