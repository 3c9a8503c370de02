// What a thread block has to do: its rows and its part's pieces. And where in its rings it is.
#pragma once

#include "sm90/dense_decode/config.h"

namespace flashmla::sm90::dense_decode {

// The up to kRows query rows of a sequence that this block computes: neighbours in [s_q, h_q]. With
// one KV head the rows of all query tokens are packed; with several, a tile holds one query
// token's.
struct RowTile {
  int first;  // row within [s_q, h_q]
  int count;

  template <int kRows>
  __device__ void find(const KernelArgs& args) {
    const int tile = blockIdx.x;
    if (args.heads_per_kv == args.h_q) {
      first = tile * kRows;
      count = min(args.rows - first, kRows);
    } else {
      const int tiles_per_query = (args.heads_per_kv + kRows - 1) / kRows;
      const int head = tile % tiles_per_query * kRows;
      first = tile / tiles_per_query * args.h_q + blockIdx.y * args.heads_per_kv + head;
      count = min(args.heads_per_kv - head, kRows);
    }
  }
};

// Cut `index`, made safe against schedules with foreign contents.
__device__ __forceinline__ Cut load_cut(const KernelArgs& args, int index) {
  const int2 raw = reinterpret_cast<const int2*>(args.cuts)[index];
  if (raw.x >= args.b) return {args.b, 0};
  return {max(raw.x, 0), max(raw.y, 0)};
}

__device__ __forceinline__ int clamp_seqlen(const KernelArgs& args, int seqlen) {
  return min(max(seqlen, 0), args.max_tokens);
}

__device__ __forceinline__ int load_seqlen(const KernelArgs& args, int sequence) {
  return clamp_seqlen(args, args.cache_seqlens[sequence]);
}

// The slot of a load in a ring, and the parity of the ring's current round.
template <int kStages>
struct RingIndex {
  int slot = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    if (++slot == kStages) {
      slot = 0;
      parity ^= 1;
    }
  }
};

}  // namespace flashmla::sm90::dense_decode
