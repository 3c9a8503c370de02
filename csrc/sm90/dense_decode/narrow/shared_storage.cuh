// The narrow kernel's plan of shared memory.
#pragma once

#include "../load.cuh"
#include "../work.cuh"

namespace flashmla::sm90::narrow {

// Loads in shared memory: their latent columns, as many as fit, and their rope columns.
template <int kRows>
constexpr int kStages = kRows <= 16 ? 3 : 2;
constexpr int kRopeStages = 2;

// kRows: query rows of a tile.
template <int kRows>
struct alignas(1024) SharedStorage {
  // Load t, a tile or a piece's queries on their way: columns 0-511 in slot t % kStages ...
  uint8_t latent[kStages<kRows>][2][kHalfBytes];
  // ... and 512-575 in slot t % kRopeStages; a tile's probabilities once its scores are computed.
  uint8_t rope[kRopeStages][kChunkBytes];
  uint8_t query[kChunks][kRows * kChunkRowBytes];
  float exchange[2][kWarps][kRows];        // between the score warps, in turns
  float inverse_sum[kRows];                // of the last piece that is not empty
  uint8_t rescale[kStages<kRows>][kRows];  // the output so far is to be divided by 2 to this power
  uint8_t exponent[2][kRows][kWarps];      // of the largest output of a value warp
  // Barriers, by slot.
  uint64_t half_full[2][kStages<kRows>];  // left or right half loaded
  uint64_t rope_full[kRopeStages];
  uint64_t probabilities_stored[kStages<kRows>];  // and the rescale powers; or the queries taken
  uint64_t load_done[kStages<kRows>];             // both value warpgroups are through with the load
  uint64_t sums_full, sums_empty;                 // inverse_sum
  RowTile row_tile;
};
static_assert(sizeof(SharedStorage<16>) <= 232448 && sizeof(SharedStorage<kNarrowRows>) <= 232448,
              "Hopper has 227 KB a block");

// A load's slots in both rings.
template <int kRows>
struct Ring {
  RingIndex<kStages<kRows>> latent;
  RingIndex<kRopeStages> rope;

  __device__ __forceinline__ void advance() {
    latent.advance();
    rope.advance();
  }
};

// Of the rows of a product's N a thread holds 2 (lane % 4) and the next of every eight.
template <int kRows>
constexpr int kThreadRows = kRows / 4;

__device__ __forceinline__ int query_row(int i) {
  return threadIdx.x % 4 * 2 + (i & 1) + (i >> 1) * 8;
}

// Where a product's element is in a thread's registers: of its query row i, and of row
// lane / 4 + 8 m of the warp's 16 of M.
__device__ __forceinline__ constexpr int element(int i, int m) {
  return (i >> 1) * 4 + m * 2 + (i & 1);
}

}  // namespace flashmla::sm90::narrow
