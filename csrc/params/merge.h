// What the merge of partial results is given, whichever operation wrote them.
// Arrays are row-major; extents have been checked, values (cuts) have not.
#pragma once

#include <cstdint>

#include "params/dtype.h"

namespace flashmla {

// Merges the pieces of each sequence that the cuts divide: out = sum of w_i out_i / sum of w_i with
// w_i = 2^lse_i. Sequences in one piece are left alone. Workspace slots: schedule/pieces.h; how a
// slot keeps its columns is the implementation's business (sm90/attention/partial.cuh).
struct MergeParams {
  int b;
  int rows;  // of a sequence: s_q * h_q, heads innermost
  int h_q, d_v, num_parts;
  DType dtype;  // of out

  const int32_t* cuts;     // [num_parts + 1, 2] (sequence, tile)
  const float* out_accum;  // [2 * num_parts, rows, d_v]
  const float* lse_accum;  // [2 * num_parts, rows] base-2 log
  // [h_q] natural log, or null: out is multiplied by exp(lse) / (exp(lse) + exp(sink)), lse is not.
  // -inf is no sink, inf makes out 0.
  const float* attn_sink;

  void* out;   // [b, rows, d_v]
  float* lse;  // [b, rows] natural log; -inf where nothing is attended
};

}  // namespace flashmla
