// What each operation is given: one struct per operation, filled by ffi/ and read by cpu/ and
// sm90/. All arrays are dense and row-major. Extents have been checked against one another by
// ffi/to_params; values (block ids, lengths) have not: whoever dereferences them clamps them.
#pragma once

#include <cstdint>

namespace flashmla {

enum class DType : int32_t { kBFloat16, kFloat16, kFloat32 };

// Splits the batch's tokens over num_parts workers; see split_schedule.h for what a cut means.
struct MakeScheduleParams {
  int b;
  int num_parts;
  const int32_t* cache_seqlens;  // [b] tokens; negative counts as 0
  int32_t* cuts;                 // [num_parts + 1, 2] (sequence, tile)
};

// out = softmax(sm_scale * q . keys) . values over a paged cache whose rows serve as key and value.
// Query head h reads KV head h / (h_q / h_kv). The value of a row is its first d_v columns.
struct DenseDecodeParams {
  int b, s_q, h_q, h_kv, d_qk, d_v;
  int64_t num_blocks;
  int block_size, max_blocks, num_parts;
  DType dtype;  // of q, blocks and out
  float sm_scale;
  bool causal;

  const void* q;                 // [b, s_q, h_q, d_qk]
  const void* blocks;            // [num_blocks, block_size, h_kv, d_qk]
  const int32_t* block_table;    // [b, max_blocks] ids; outside [0, num_blocks) reads as zeros
  const int32_t* cache_seqlens;  // [b] tokens; clamped to [0, max_blocks * block_size]
  const int32_t* cuts;           // [num_parts + 1, 2] from make_schedule

  void* out;   // [b, s_q, h_q, d_v]
  float* lse;  // [b, s_q, h_q] natural log; -inf where nothing is attended
  // Workspace for sequences cut between parts, one slot per piece: part p keeps the piece that it
  // continues in slot 2p and the piece that it leaves unfinished in slot 2p + 1. Its contents are
  // the implementation's own business (sm90's is in sm90/partial.cuh).
  float* out_accum;  // [2 * num_parts, s_q, h_q, d_v]
  float* lse_accum;  // [2 * num_parts, s_q, h_q] base-2 log
};

// Writes rows[i, j] at token position positions[i] + j of sequence i, for j < num_new[i]; rows
// whose position has no block in the table (or a block id out of range) are dropped.
struct CacheAppendParams {
  int b, s_new, max_blocks, block_size;
  int64_t num_blocks;
  int64_t row_bytes;  // of one token: h_kv * row * itemsize

  const void* blocks;          // [num_blocks, block_size, h_kv, row]
  const void* rows;            // [b, s_new, h_kv, row]
  const int32_t* block_table;  // [b, max_blocks]
  const int32_t* positions;    // [b] first token position to write
  const int32_t* num_new;      // [b] rows to write, clamped to [0, s_new]
  // As blocks. Aliased to it where the caller donates; but XLA may fuse the operation with the
  // slices around it and then gives it a buffer of its own, to which blocks must be copied first.
  void* updated;
};

}  // namespace flashmla
