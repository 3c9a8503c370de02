// What sparse_decode is given.
// All arrays are dense and row-major. Extents have been checked against one another by ffi/;
// values (indices, lengths, the first block) have not: whoever dereferences them checks them.
#pragma once

#include <cstdint>

#include "formats.h"
#include "params/dtype.h"

namespace flashmla {

// A paged cache and what each query token attends in it.
struct SparseSource {
  Format format;
  int64_t num_blocks;
  int64_t block_bytes;  // from a block to the next, padding included
  int64_t row_stride;   // dense: elements from one row to the next, at least d_qk
  int block_size;       // tokens
  int topk;
  // The layer that is attended: its blocks, of which the array has `num_blocks`. It has less than
  // 2^31 slots.
  int64_t layer_blocks;
  const int32_t* first_block;  // []; clamped to [0, num_blocks - layer_blocks]; null: 0

  const void* blocks;  // dense: [num_blocks, block_size, 1, row_stride]; else bytes
  // [b, s_q, topk] slots of the layer, block * block_size + offset; others are not attended.
  const int32_t* indices;
  const int32_t* topk_length;  // [b, s_q] clamped to [0, topk]; null: topk
};

// out = softmax(sm_scale * q . keys) . values over the rows that the indices name. A row is key and
// value; its value is its first d_v columns. A row named twice counts twice.
struct SparseDecodeParams {
  int b, s_q, h_q, d_qk, d_v;
  int num_parts;
  DType dtype;  // of q, out and dense blocks
  float sm_scale;

  SparseSource main;
  SparseSource extra;  // attended together with main; blocks null where there is none

  const void* q;           // [b, s_q, h_q, d_qk]
  const float* kv_scale;   // [] factor of all codes; kFp8Row only
  const float* attn_sink;  // [h_q] natural log; scales out, not lse; null: none
  // [num_parts + 1, 2] (query token of b * s_q, tile): tiles of 64 indices, the main cache's
  // ceil(length / 64), then the extra cache's.
  const int32_t* cuts;

  void* out;   // [b, s_q, h_q, d_v]
  float* lse;  // [b, s_q, h_q] natural log; -inf where nothing is attended
  // Workspace for query tokens cut between parts, as in DenseDecodeParams.
  float* out_accum;  // [2 * num_parts, h_q, d_v]
  float* lse_accum;  // [2 * num_parts, h_q] base-2 log
};

}  // namespace flashmla
