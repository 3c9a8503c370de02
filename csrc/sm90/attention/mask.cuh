// Which of a sequence's tokens a query row may see.
#pragma once

#include <cstdint>

#include "schedule/pieces.h"

namespace flashmla::sm90 {

// Tokens, from the sequence's first on, that row `row` of [s_q, h_q] sees. A causal row sees all
// but the tokens of later queries.
__device__ __forceinline__ int seen_tokens(int seqlen, uint32_t row, int h_q, int s_q,
                                           bool causal) {
  const int query = row / h_q;
  return causal ? seqlen - (s_q - 1 - query) : seqlen;
}

// The same where `seen` [s_q] says it. Rows past the last see as that does.
__device__ __forceinline__ int given_tokens(const int32_t* seen, int seqlen, uint32_t row, int h_q,
                                            int s_q) {
  return min(seen[min(row / h_q, s_q - 1u)], seqlen);
}

// Tiles, from the sequence's first on, all of whose tokens every row sees.
__device__ __forceinline__ int count_unmasked_tiles(int seqlen, int s_q, bool causal) {
  return (seqlen - (causal ? s_q - 1 : 0)) / kSplitTile;
}

}  // namespace flashmla::sm90
