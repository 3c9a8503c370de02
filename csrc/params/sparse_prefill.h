// What sparse_prefill is given.
// All arrays are dense and row-major. Extents have been checked against one another by ffi/;
// values (indices, lengths) have not: whoever dereferences them checks them.
#pragma once

#include <cstdint>

#include "params/dtype.h"

namespace flashmla {

// out = softmax(sm_scale * q . keys) . values over the rows that the indices name. A row is key and
// value; its value is its first d_v columns. A row named twice counts twice.
struct SparsePrefillParams {
  int s_q, h_q, s_kv, d_qk, d_v, topk;
  DType dtype;  // of q, kv and out
  float sm_scale;

  const void* q;               // [s_q, h_q, d_qk]
  const void* kv;              // [s_kv, 1, d_qk]
  const int32_t* indices;      // [s_q, topk] rows; others than [0, s_kv) are not attended
  const int32_t* topk_length;  // [s_q] clamped to [0, topk]; null: topk
  const float* attn_sink;      // [h_q] natural log; scales out, not lse; null: none

  void* out;          // [s_q, h_q, d_v]
  float* lse;         // [s_q, h_q] natural log; -inf where nothing is attended
  float* max_logits;  // [s_q, h_q] largest scaled score; -inf where nothing is attended
};

}  // namespace flashmla
