// A block's share of a row of scores, and keys: integers that are ordered as scores are.
#pragma once

#include <cmath>

#include "sm90/index_topk/shared_storage.cuh"

namespace flashmla::sm90::index_topk {

constexpr uint32_t kLeastKey = 0x00800000;  // of the least finite score

// 0 for what is never selected, -inf and NaN; at least kLeastKey for all others.
__device__ __forceinline__ uint32_t key_of(float score) {
  const uint32_t bits = __float_as_uint(score + 0.0f);  // -0.0 and 0.0 are equal
  const uint32_t key = bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 1u << 31);
  return score > -INFINITY ? key : 0;
}

// The score of a key that is not 0.
__device__ __forceinline__ float score_of(uint32_t key) {
  return __uint_as_float(key & 1u << 31 ? key ^ 1u << 31 : ~key);
}

struct Slice {
  const float* scores;   // of its tokens
  const int32_t* table;  // of its blocks
  int begin, count;      // tokens; begin is a multiple of 64
  uint32_t layer_blocks;
  bool check_blocks;

  // An even share of the `seen` tokens of a row.
  static __device__ Slice of_block(const KernelArgs& args, int64_t row, int seen, int blocks,
                                   int rank) {
    const int tiles = (seen + 63) / 64, share = (tiles + blocks - 1) / blocks;
    const int begin = min(rank * share, tiles) * 64, count = min(share * 64, max(seen - begin, 0));
    const int64_t sequence = row / args.queries;
    return {.scores = args.scores + row * args.max_tokens + begin,
            .table = args.block_table + sequence * args.max_blocks + begin / 64,
            .begin = begin,
            .count = count,
            .layer_blocks = args.layer_blocks,
            .check_blocks = args.given};
  }

  __device__ __forceinline__ bool in_layer(int i) const {
    return !check_blocks || static_cast<uint32_t>(table[i / 64]) < layer_blocks;
  }
  __device__ __forceinline__ float score(int i) const { return in_layer(i) ? scores[i] : NAN; }
  __device__ __forceinline__ uint32_t key(int i) const { return key_of(score(i)); }
};

}  // namespace flashmla::sm90::index_topk
