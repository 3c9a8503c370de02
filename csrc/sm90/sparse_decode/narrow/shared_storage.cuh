// The kernel's plan of shared memory, and where a role is in the ring.
#pragma once

#include "sm90/ptx/smem_desc.cuh"
#include "sm90/sparse_decode/narrow/config.h"
#include "sm90/sparse_decode/work.cuh"

namespace flashmla::sm90::sparse::narrow {

// Items of four slots, as tiles of tokens are, as which a tile's queries pass through the ring.
constexpr int kQueryItems = 1;
// kRows: query heads of a tile.
template <int kRows>
constexpr int kSlotHeads = kRows / kTileSlots;
constexpr int kStages = 4;  // items that the ring holds: two in use, two on their way

// Where a gathering warp is (gather.cuh). Kept here as its registers are few.
struct GatherState {
  int query, length;   // query token of the next item, and its indices that count
  int tile, tile_end;  // its next tile; equal where the part is at its end
  int queries_left;    // items of queries before the next tile
  int room;            // items that may be filled once their slots are empty
  int stage;           // of the next one
  uint32_t parity;
};

template <typename Format, int kRows>
struct alignas(1024) SharedStorage {
  static constexpr int kChunks = Format::kHeadDim / kChunkColumns;
  static constexpr int kSlotBytes =
      kSlotTokens * Format::kRowBytes > kSlotHeads<kRows>* Format::kHeadDim * 2
          ? kSlotTokens * Format::kRowBytes
          : kSlotHeads<kRows> * Format::kHeadDim * 2;

  uint8_t query[kChunks][kRows * kChunkRowBytes];    // K-major, 128-byte swizzle
  uint8_t probabilities[2][kRows * kChunkRowBytes];  // [row][token], the same
  uint8_t ring[kStages][kTileSlots][kSlotBytes];     // raw rows end to end; or queries
  // By group of columns the bf16 scales of a tile's tokens, times kPlaced: for each half of the
  // tile and lane t of a quad the tokens 2t and 2t + 1 of every eight, one after the other.
  alignas(16) uint16_t scales[kStages][Format::kScaleGroups][kTileTokens];
  // Of a tile's tokens the scales by group relative to the largest, f16 twice; what 1 / the largest
  // is, bf16 twice; and what products with its keys are to be multiplied with. Each score warp's
  // own.
  alignas(16) uint32_t key_scales[kTileTokens][Format::kScaleGroups];
  uint32_t rope_scale[kTileTokens];
  float score_scale[kTileTokens];
  uint32_t query_peak[kWarps];                 // largest magnitudes of queries, bf16x2
  float4 sums[kRows / 16][kWarpgroupThreads];  // each score thread's, of its rows
  float reference[kRows];                      // of the piece so far, and what is subtracted for it
  float offset[kRows];
  float exchange[kWarps][kRows];  // between the score warps
  float inverse_sum[kRows];       // of the last piece that is not empty, times the sink's share
  float factor[kRows];            // of outputs that are to be stored as partial results
  alignas(16) uint8_t exponent[kRows][16];  // of a value warp's largest output
  uint8_t rescale[2][kRows];                // the output so far is to be divided by 2 to this power
  alignas(4) uint8_t flags[2][kWarps];      // of a tile, by score warp: kRescaled, kLargeScales
  uint32_t valid[kStages][kTileSlots];      // bit t: token t of the slot is attended
  uint64_t full[kStages][kTileSlots];       // slot gathered
  uint64_t empty[kStages][kTileSlots];      // all value warps are through with it
  uint64_t probabilities_full[2], probabilities_empty[2];
  uint64_t sums_full, sums_empty;  // inverse_sum
  const uint8_t* layer;            // its first block
  Cut begin, end;                  // of the part
  GatherState gather[kWarps];
  int32_t next_index[kWarps][kSlotTokens];
};
static_assert(kValueWarps <= 16);

constexpr uint8_t kRescaled = 1, kHasLargeScales = 2;

// Where a role is in the ring.
template <int kCount>
struct RingPosition {
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == kCount) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// A buffer of two, and the parity of its round.
struct BufferPosition {
  uint32_t turn = 0;

  __device__ __forceinline__ int slot() const { return turn & 1; }
  __device__ __forceinline__ uint32_t parity() const { return turn >> 1 & 1; }
};

// Of the rows of a product's N a thread holds 2 (lane % 4) and the next of every eight.
template <int kRows>
constexpr int kThreadRows = kRows / 4;

__device__ __forceinline__ int query_row(int thread, int i) {
  return thread % 4 * 2 + (i & 1) + (i >> 1) * 8;
}

// Where a product's element is in a thread's registers: of its query row i, and of row
// lane / 4 + 8 m of the warp's 16 of M.
__device__ __forceinline__ constexpr int element(int i, int m) {
  return (i >> 1) * 4 + m * 2 + (i & 1);
}

}  // namespace flashmla::sm90::sparse::narrow
