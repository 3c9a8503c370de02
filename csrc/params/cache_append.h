// What cache_append is given.
// All arrays are dense and row-major. Extents have been checked against one another by ffi/;
// values (block ids, lengths) have not: whoever dereferences them clamps them.
#pragma once

#include <cstdint>

#include "formats.h"
#include "params/dtype.h"

namespace flashmla {

// Writes rows[i, j] at token position positions[i] + j of sequence i, for j < num_new[i]; rows
// whose position has no block in the table (or a block id out of range) are dropped.
struct CacheAppendParams {
  int b, s_new, max_blocks, block_size;
  int64_t num_blocks;
  int64_t block_bytes;  // from one block to the next
  Format format;        // of blocks
  DType rows_dtype;     // of rows; dense: of blocks too
  int h_kv, d;          // heads of a token, columns of a head's row
  int64_t row_stride;   // dense: elements from one head's row to the next, at least d

  const void* blocks;          // dense: [num_blocks, block_size, h_kv, row_stride]; else bytes
  const void* rows;            // [b, s_new, h_kv, d]
  const int32_t* block_table;  // [b, max_blocks]
  const int32_t* positions;    // [b] first token position to write
  const int32_t* num_new;      // [b] rows to write, clamped to [0, s_new]
  const float* kv_scale;       // [] factor of all codes; kFp8Row only
  // As blocks. Aliased to it where the caller donates; but XLA may fuse the operation with the
  // slices around it and then gives it a buffer of its own, to which blocks must be copied first.
  void* updated;
};

}  // namespace flashmla
