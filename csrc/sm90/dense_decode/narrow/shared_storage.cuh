// The narrow kernel's plan of shared memory.
#pragma once

#include "sm90/attention/work.cuh"
#include "sm90/dense_decode/load.cuh"

namespace flashmla::sm90::dense_decode::narrow {

constexpr int kThreads = kComputeThreads + 32;  // and a warp that loads
constexpr int kLoadingThread = kComputeThreads;

// Loads in shared memory. A third would not leave room, beside 16 query rows, for a block of the
// merge: that it is on the multiprocessor before this kernel's block ends is worth more.
constexpr int kStages = 2;
using Ring = RingIndex<kStages>;

// kRows: query rows of a tile.
template <int kRows>
struct alignas(1024) SharedStorage {
  // Load t, a tile or a piece's queries on their way, in slot t % kStages: columns 0-511 ...
  uint8_t latent[kStages][2][kHalfBytes];
  // ... and 512-575; a tile's probabilities once its scores are computed.
  uint8_t rope[kStages][kChunkBytes];
  uint8_t query[kChunks][kRows * kChunkRowBytes];
  float exchange[2][kWarpgroupWarps][kRows];  // between the score warps, in turns
  float inverse_sum[kRows];                   // of the last piece that is not empty
  float factor[2][kRows];  // multiplies each half's outputs when they are stored as partial results
  uint8_t rescale[kStages][kRows];              // divide the output so far by 2 to this power
  uint8_t exponent[2][kRows][kWarpgroupWarps];  // of the largest output of a value warp
  // Barriers, one per slot.
  uint64_t half_full[2][kStages];  // left or right half loaded
  uint64_t rope_full[kStages];
  uint64_t probabilities_stored[kStages];  // and the rescale powers; or the queries taken
  uint64_t load_done[kStages];             // both value warpgroups are through with the load
  uint64_t sums_full, sums_empty;          // inverse_sum
  RowTile row_tile;
};
// A multiprocessor's 228 KB hold this block, 11 KB of a merge block, and 1 KB for each that the
// system keeps.
static_assert(sizeof(SharedStorage<kLeastRows>) <= (228 - 2 - 11) * 1024);
static_assert(sizeof(SharedStorage<kNarrowRows>) <= 232448, "Hopper has 227 KB a block");

// Query rows that a thread holds of a product's N = `rows`: 2 (lane % 4) and the next of every
// eight.
constexpr int thread_rows(int rows) { return rows / 4; }

__device__ __forceinline__ int query_row(int i) {
  return threadIdx.x % 4 * 2 + (i & 1) + (i >> 1) * 8;
}

// Register of a product's element: this thread's query row i, and row lane / 4 + 8 m of the warp's
// 16 of M.
__device__ __forceinline__ constexpr int element(int i, int m) {
  return (i >> 1) * 4 + m * 2 + (i & 1);
}

}  // namespace flashmla::sm90::dense_decode::narrow
