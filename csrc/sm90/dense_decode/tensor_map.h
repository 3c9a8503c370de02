// Tensor maps over the paged cache and the queries.
#pragma once

#include <cuda.h>

#include "params/dense_decode.h"
#include "status.h"

namespace flashmla::sm90::dense_decode {

// Both maps have boxes of `rows` rows by `chunks` chunks of 64 columns, written to shared memory in
// the 128-byte swizzle. What is out of bounds reads as zeros.

// Eight rows' chunks, then the next eight rows'. Coordinates: 0, token within eight, chunk (all KV
// heads' in a row), eight tokens of the block, block.
Status make_cache_map(const DenseDecodeParams& params, int rows, int chunks, CUtensorMap* map);

// All rows of a chunk, then of the next. Coordinates: 0, row of [b, s_q, h_q], chunk, 0, 0.
Status make_query_map(const DenseDecodeParams& params, int rows, int chunks, CUtensorMap* map);

}  // namespace flashmla::sm90::dense_decode
