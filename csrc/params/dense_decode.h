// What dense_decode is given.
// All arrays are dense and row-major. Extents have been checked against one another by ffi/;
// values (block ids, lengths) have not: whoever dereferences them clamps them.
#pragma once

#include <cstdint>

#include "formats.h"
#include "params/dtype.h"

namespace flashmla {

// out = softmax(sm_scale * q . keys) . values over a paged cache whose rows serve as key and value.
// Query head h reads KV head h / (h_q / h_kv). The value of a row is its first d_v columns.
struct DenseDecodeParams {
  int b, s_q, h_q, h_kv, d_qk, d_v;
  int64_t num_blocks;
  int block_size, max_blocks, num_parts;
  int tile_rows;        // query rows of a tile that the schedule was made for; advice for sm90
  DType dtype;          // of q, out and dense blocks
  Format format;        // of blocks
  int64_t block_bytes;  // from one block to the next
  int64_t row_stride;   // dense: elements from one head's row to the next, at least d_qk
  float sm_scale;
  bool causal;

  const void* q;                 // [b, s_q, h_q, d_qk]
  const void* blocks;            // dense: [num_blocks, block_size, h_kv, row_stride]; else bytes
  const int32_t* block_table;    // [b, max_blocks] ids; outside [0, num_blocks) reads as zeros
  const int32_t* cache_seqlens;  // [b] tokens; clamped to [0, max_blocks * block_size]
  // Where a causal query's end is not told by its number, as every other token is elsewhere:
  // [b, s_q] tokens that each query sees, at least the sequence's less s_q - 1; null elsewhere.
  const int32_t* seen = nullptr;
  const int32_t* cuts;    // [num_parts + 1, 2] from make_schedule
  const float* kv_scale;  // [] factor of all codes; kFp8Row only

  void* out;   // [b, s_q, h_q, d_v]
  float* lse;  // [b, s_q, h_q] natural log; -inf where nothing is attended
  // Workspace for sequences cut between parts, one slot per piece: part p keeps the piece that it
  // continues in slot 2p and the piece that it leaves unfinished in slot 2p + 1. Its contents are
  // the implementation's own business (sm90's is in sm90/attention/partial.cuh).
  float* out_accum;  // [2 * num_parts, s_q, h_q, d_v]
  float* lse_accum;  // [2 * num_parts, s_q, h_q] base-2 log
};

}  // namespace flashmla
