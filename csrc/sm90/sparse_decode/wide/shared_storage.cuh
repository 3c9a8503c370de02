// The wide kernel's plan of shared memory.
#pragma once

#include "sm90/ptx/smem_desc.cuh"
#include "sm90/sparse_decode/wide/config.h"
#include "sm90/sparse_decode/wide/formats.cuh"
#include "sm90/sparse_decode/work.cuh"

namespace flashmla::sm90::sparse::wide {

// A row of zeros of any format.
alignas(16) __device__ const uint8_t kZeroRow[1152] = {};

enum class Source : int { kNone, kMain, kExtra };  // kNone: past the part's last tile

// The rows of a tile, by token: where they are in global memory; kZeroRow where nothing is
// attended.
template <bool kTwoPlanes>
struct Plan {
  const uint8_t* row[kTileTokens];
  const uint8_t* scales[kTwoPlanes ? kTileTokens : 1];  // their places in the second plane
  uint16_t attended[kWarps];                            // bit t: token t of sixteen
  Source source;
};

// Where a planning warp is (plan.cuh). Kept here as its registers are few.
struct PlannerState {
  int query, tile, tile_end;  // the next tile; equal where the part is at its end
  QueryTiles tiles;
  uint32_t planned;  // tiles, and one that says that there is none
};

// Main, Extra: the two caches' formats, of one d_qk.
template <typename Main, typename Extra>
struct alignas(1024) SharedStorage {
  static constexpr int kChunks = Main::kHeadDim / kChunkColumns;
  static constexpr bool kRope = kChunks > kLatentChunks;  // a chunk that is no value
  static_assert(Main::kHeadDim == Extra::kHeadDim);

  uint8_t query[kChunks][kChunkBytes];  // [row][64 columns], K-major in the 128-byte swizzle
  uint8_t keys[kBuffers][kChunks][kChunkBytes];  // [token][64 columns], the same
  // [row][token]; with rope in the place of a tile's rope columns, once its scores are computed.
  uint8_t own_probabilities[kRope ? 0 : kBuffers][kChunkBytes];
  uint8_t rescale[kBuffers][kRows];  // divide the output so far by 2 to this power
  // Of the last three pieces that are not empty: the next but one's may be written while the value
  // warpgroups still store.
  float inverse_sum[3][kRows];
  Plan<Main::kTwoPlanes || Extra::kTwoPlanes> plan[kPlans];
  uint64_t planned[kPlans];
  uint64_t query_full;
  uint64_t keys_full[kBuffers];
  uint64_t keys_empty[kBuffers][2];         // by half: all value warps are through with its tokens
  uint64_t scores_done[kBuffers];           // all score warps have read the tile
  uint64_t probabilities_stored[kBuffers];  // and the rescale powers
  uint64_t values_go[kBuffers];             // the tensor cores are free for the value products
  const uint8_t* layer[2];                  // first blocks of main and extra
  Cut begin, end;                           // of the part
  PlannerState planner[kWarps];

  __device__ __forceinline__ uint8_t* probabilities(int buffer) {
    if constexpr (kRope)
      return keys[buffer][kLatentChunks];
    else
      return own_probabilities[buffer];
  }
};

// Buffer and parity of the part's tile `tile`.
__device__ __forceinline__ int buffer_of(uint32_t tile) { return tile % kBuffers; }
__device__ __forceinline__ uint32_t parity_of(uint32_t tile) { return tile / kBuffers & 1; }

}  // namespace flashmla::sm90::sparse::wide
