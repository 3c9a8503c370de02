// Tensor maps over the paged cache and the queries.
#pragma once

#include <cuda.h>

#include "../../params.h"
#include "../../status.h"

namespace flashmla::sm90 {

// Both maps have boxes of some rows by `chunks` groups of 64 columns, written to shared memory
// group by group in the 128-byte swizzle. What is out of bounds reads as zeros.

// 64 rows a box. Coordinates: 0, token of the block, column group (all KV heads' in a row), block.
Status make_cache_map(const DenseDecodeParams& params, int chunks, CUtensorMap* map);

// `rows` rows a box. Coordinates: 0, row of [b, s_q, h_q], column group, 0.
Status make_query_map(const DenseDecodeParams& params, int rows, int chunks, CUtensorMap* map);

}  // namespace flashmla::sm90
