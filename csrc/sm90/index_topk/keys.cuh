// A block's share of a row of scores, as keys: integers that are ordered as the scores are.
#pragma once

#include <cmath>

#include "sm90/index_topk/shared_storage.cuh"

namespace flashmla::sm90::index_topk {

// 0 for what is never selected, -inf and NaN; larger than that for all others.
__device__ __forceinline__ uint32_t key_of(float score) {
  const uint32_t bits = __float_as_uint(score + 0.0f);  // -0.0 and 0.0 are equal
  const uint32_t key = bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 1u << 31);
  return score > -INFINITY ? key : 0;
}

struct Slice {
  const float* scores;   // of its tokens
  const int32_t* table;  // of its blocks
  int begin, count;      // tokens; begin is a multiple of 64
  int kept;              // leading keys that are in shared memory
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
            .kept = min(count, args.key_room),
            .layer_blocks = args.layer_blocks,
            .check_blocks = args.given};
  }

  __device__ __forceinline__ bool in_layer(int i) const {
    return !check_blocks || static_cast<uint32_t>(table[i / 64]) < layer_blocks;
  }

  // Four keys from token i of the slice on, i a multiple of 4.
  __device__ __forceinline__ uint4 make_keys(int i, float4 scores, bool in_layer) const {
    const int left = in_layer ? count - i : 0;
    return {left > 0 ? key_of(scores.x) : 0, left > 1 ? key_of(scores.y) : 0,
            left > 2 ? key_of(scores.z) : 0, left > 3 ? key_of(scores.w) : 0};
  }
  __device__ __forceinline__ float4 load_scores(int i) const {
    return *reinterpret_cast<const float4*>(scores + i);
  }

  __device__ __forceinline__ uint32_t key(const uint32_t* keys, int i) const {
    if (i < kept) return keys[i];
    return in_layer(i) ? key_of(scores[i]) : 0;
  }
};

// visit(keys) with all of the slice's, four at a time, read from HBM or L2; keeps what there is
// room for.
template <typename Visit>
__device__ __forceinline__ void load_keys(const Slice& slice, uint32_t* keys, const Visit& visit) {
  constexpr int kAhead = 4, kStep = kThreads * 4;
  for (int base = threadIdx.x * 4; base < slice.count; base += kAhead * kStep) {
    float4 scores[kAhead];
    bool in_layer[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int i = base + k * kStep;
      if (i < slice.count) {
        scores[k] = slice.load_scores(i);
        in_layer[k] = slice.in_layer(i);
      }
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int i = base + k * kStep;
      if (i < slice.count) {
        const uint4 four = slice.make_keys(i, scores[k], in_layer[k]);
        if (i < slice.kept) *reinterpret_cast<uint4*>(keys + i) = four;
        visit(four);
      }
    }
  }
}

// visit(keys) with all of the slice's once more.
template <typename Visit>
__device__ __forceinline__ void read_keys(const Slice& slice, const uint32_t* keys,
                                          const Visit& visit) {
  for (int i = threadIdx.x * 4; i < slice.count; i += kThreads * 4) {
    visit(i < slice.kept ? *reinterpret_cast<const uint4*>(keys + i)
                         : slice.make_keys(i, slice.load_scores(i), slice.in_layer(i)));
  }
}

}  // namespace flashmla::sm90::index_topk
