// What index_scores is given.
// All arrays are dense and row-major. Extents have been checked against one another by ffi/;
// values (block ids, lengths, the first block) have not: whoever dereferences them checks them.
#pragma once

#include <cstdint>

#include "formats.h"

namespace flashmla {

constexpr int kIndexColumns = 128;   // of a query head and of a key
constexpr int kIndexBlockSize = 64;  // tokens
constexpr int kMaxIndexHeads = 64;

// Keys of the indexer, by the tables of the sequences that they belong to.
struct IndexKeys {
  int64_t num_blocks;
  int64_t block_bytes;         // from a block to the next
  int64_t layer_blocks;        // of the layer; the array has num_blocks
  int max_blocks;              // columns of the table
  const int32_t* first_block;  // []; clamped to [0, num_blocks - layer_blocks]
  const void* blocks;          // [num_blocks, block_bytes]: 64 x 128 e4m3, then 64 f32 scales
  const int32_t*
      block_table;  // [b, max_blocks] ids; tokens of ids outside [0, layer_blocks) are not visible
  const int32_t* cache_seqlens;  // [b] tokens; clamped to [0, max_blocks * 64]
};

// scores[i, j, t] = sum over heads h of weights[i, j, h] * relu(q[i, j, h] . key t) * scale t where
// token t is visible, else -inf. A NaN in any factor makes it NaN. Causal: query j sees tokens t <=
// length - s_q + j.
struct IndexScoresParams {
  int b, s_q, heads;
  int num_parts;
  bool causal;
  bool fp8_queries;  // q is e4m3, else bf16

  IndexKeys keys;
  const void* q;         // [b, s_q, heads, 128]
  const float* weights;  // [b, s_q, heads] all scales but the keys'
  const int32_t* cuts;   // [num_parts + 1, 2] from make_schedule

  float* scores;  // [b, s_q, max_blocks * 64]
};

}  // namespace flashmla
