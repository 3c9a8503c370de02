// What each query token of the indexer sees, and which block holds it.
#pragma once

#include <algorithm>
#include <cstdint>

#include "params/index_scores.h"

namespace flashmla::cpu {

// Tokens of a sequence.
inline int64_t seqlen_of(const IndexKeys& keys, int sequence) {
  const int64_t capacity = int64_t{keys.max_blocks} * kIndexBlockSize;
  return std::clamp<int64_t>(keys.cache_seqlens[sequence], 0, capacity);
}

// How many tokens, from the sequence's first on, query token `query` of its s_q sees.
inline int64_t visible_tokens(const IndexKeys& keys, int sequence, int s_q, bool causal,
                              int query) {
  const int64_t seqlen = seqlen_of(keys, sequence);
  return causal ? std::clamp<int64_t>(seqlen - s_q + 1 + query, 0, seqlen) : seqlen;
}

inline const int32_t* table_of(const IndexKeys& keys, int sequence) {
  return keys.block_table + int64_t{sequence} * keys.max_blocks;
}

inline bool in_layer(const IndexKeys& keys, int32_t id) {
  return id >= 0 && id < keys.layer_blocks;
}

// A block of the layer by its id; null if it has none of that id.
inline const uint8_t* block_of(const IndexKeys& keys, int32_t id) {
  if (!in_layer(keys, id)) return nullptr;
  const int64_t first =
      std::clamp<int64_t>(*keys.first_block, 0, keys.num_blocks - keys.layer_blocks);
  return static_cast<const uint8_t*>(keys.blocks) + (first + id) * keys.block_bytes;
}

}  // namespace flashmla::cpu
