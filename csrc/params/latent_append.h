// What latent_append is given.
// All arrays are dense and row-major. Extents have been checked against one another by ffi/;
// values (block ids, lengths) have not: whoever dereferences them clamps them.
#pragma once

#include "params/cache_append.h"
#include "params/dtype.h"
#include "params/rope.h"

namespace flashmla {

// A token's down-projection is [query latent, latent, rotary key, anything else]. The query latent
// is normed; the latent is normed and scaled, the key rotated, and both are appended to the cache
// as the row [latent, key].
struct LatentAppendParams {
  CacheAppendParams cache;  // without rows, which are rounded to rows_dtype; d = kv_rank + rope
  DType dtype;              // of projected and q_latent
  DType norm_dtype;         // of q_norm and kv_norm
  int columns;              // of projected, at least q_rank + d
  int q_rank;               // may be 0
  int kv_rank, rope;
  RopeLayout layout;
  float q_eps, kv_eps;
  float latent_scale;  // what the normed latent is multiplied by

  const void* projected;  // [b, s_new, columns]
  const void* q_norm;     // [q_rank] weight of the query latent's norm
  const void* kv_norm;    // [kv_rank] that of the latent's
  const float* cos;       // [b, s_new, rope / 2]; empty with kNone
  const float* sin;       // as cos
  void* q_latent;         // [b, s_new, q_rank]
};

}  // namespace flashmla
