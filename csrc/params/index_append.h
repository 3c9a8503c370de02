// What index_append is given.
// All arrays are dense and row-major. Extents have been checked against one another by ffi/;
// values (block ids, lengths) have not: whoever dereferences them clamps them.
#pragma once

#include "params/cache_append.h"
#include "params/dtype.h"
#include "params/index_scores.h"
#include "params/rope.h"

namespace flashmla {

// A token's row of `projected` ends in its index key, which is normed, rotated, multiplied with a
// Hadamard matrix, quantised and appended to the cache. Index queries are rotated, multiplied and
// quantised likewise, and the scales of their codes multiplied into their heads' weights. Every
// step's result is rounded to rows_dtype.
struct IndexAppendParams {
  CacheAppendParams cache;  // of kFp8Index, without rows; rows_dtype is projected's and q's
  DType norm_dtype;         // of k_norm and k_bias
  int columns;              // of projected, at least kIndexColumns
  int heads;                // may be 0
  int pairs;                // of a row's first columns, which are rotated
  RopeLayout layout;
  bool hadamard;
  float eps;
  float weight_scale;  // what weights are multiplied by

  const void* projected;  // [b, s_new, columns]
  const void* k_norm;     // [kIndexColumns] weight of the keys' LayerNorm
  const void* k_bias;     // [kIndexColumns]
  const float* cos;       // [b, s_new, pairs]
  const float* sin;       // as cos
  const void* q;          // [b, s_new, heads, kIndexColumns]
  const float* weights;   // [b, s_new, heads]
  uint8_t* codes;         // as q, e4m3
  float* scaled;          // weights * weight_scale * scales of codes
};

// Of a Hadamard matrix of kIndexColumns rows, so that it turns without stretching.
constexpr float kHadamardScale = 0.08838834764831845f;  // kIndexColumns^-0.5

}  // namespace flashmla
