// What a thread block has to do: its part's cuts, and its rows. And where in its rings it is.
#pragma once

#include <cstdint>

#include "schedule/pieces.h"

namespace flashmla::sm90 {

// Cut `index` of a schedule of b sequences, made safe against foreign contents.
__device__ __forceinline__ Cut load_cut(const int32_t* cuts, int index, int b) {
  const int2 raw = reinterpret_cast<const int2*>(cuts)[index];
  if (raw.x >= b) return {b, 0};
  return {max(raw.x, 0), max(raw.y, 0)};
}

// The up to kRows query rows of a sequence that this block computes: neighbours in [s_q, h_q]. With
// one KV head the rows of all query tokens are packed; with several, a tile holds one query
// token's.
struct RowTile {
  int first;  // row within [s_q, h_q]
  int count;

  // tile: number of the row tile, rows: s_q * h_q.
  template <int kRows>
  __device__ void find(int tile, int kv_head, int rows, int h_q, int heads_per_kv) {
    if (heads_per_kv == h_q) {
      first = tile * kRows;
      count = min(rows - first, kRows);
    } else {
      const int tiles_per_query = (heads_per_kv + kRows - 1) / kRows;
      const int head = tile % tiles_per_query * kRows;
      first = tile / tiles_per_query * h_q + kv_head * heads_per_kv + head;
      count = min(heads_per_kv - head, kRows);
    }
  }
};

// The slot of a load in a ring, and the parity of the ring's current round.
template <int kStages>
struct RingIndex {
  int slot = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ RingIndex before() const {
    return slot > 0 ? RingIndex{slot - 1, parity} : RingIndex{kStages - 1, parity ^ 1};
  }

  __device__ __forceinline__ void advance() {
    if (++slot == kStages) {
      slot = 0;
      parity ^= 1;
    }
  }
};

}  // namespace flashmla::sm90
