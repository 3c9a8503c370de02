// A block's share of a row of scores, and keys: integers that are ordered as scores are.
#pragma once

#include <cmath>

#include "sm90/index_topk/predicated.cuh"
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

// The greatest score below a finite one, or below infinity.
__device__ __forceinline__ float below(float score) {
  const uint32_t key = key_of(score);
  return score_of(key - (key == 1u << 31 ? 2 : 1));  // past -0.0, which equals 0.0
}

struct Slice {
  const float* scores;   // of its tokens
  const int32_t* table;  // of its blocks
  int begin, count;      // tokens; begin is a multiple of 64
  uint32_t layer_blocks;
  bool check_blocks;

  // Of a whole row that sees `seen` tokens.
  static __device__ Slice of_row(const KernelArgs& args, uint32_t row, uint32_t sequence,
                                 int seen) {
    return {.scores = args.scores + row * args.max_tokens,
            .table = args.block_table + int64_t{sequence} * args.max_blocks,
            .begin = 0,
            .count = seen,
            .layer_blocks = args.layer_blocks,
            .check_blocks = args.given};
  }

  // An even share of it, a block's of a power of two.
  __device__ Slice share(uint32_t blocks, uint32_t rank) const {
    const int shift = __ffs(blocks) - 1;
    const int tiles = (count + 63) / 64, share = (tiles + blocks - 1) >> shift;
    Slice slice = *this;
    slice.begin = min(static_cast<int>(rank) * share, tiles) * 64;
    slice.count = min(share * 64, max(count - slice.begin, 0));
    slice.scores += slice.begin;
    slice.table += slice.begin / 64;
    return slice;
  }

  __device__ __forceinline__ bool in_layer(int i) const {
    return !check_blocks || static_cast<uint32_t>(table[i / 64]) < layer_blocks;
  }
  __device__ __forceinline__ float score(int i) const {
    const float score = scores[i];
    return in_layer(i) ? score : NAN;
  }
};

}  // namespace flashmla::sm90::index_topk
