// The kernel's plan of shared memory, and which rows and registers a thread has.
#pragma once

#include "sm90/attention/work.cuh"
#include "sm90/dense_decode/fp8/config.h"
#include "sm90/ptx/smem_desc.cuh"
#include "sm90/ptx/thread.cuh"

namespace flashmla::sm90::dense_decode::fp8 {

// Tiles in shared memory: as many as there is room for with 64 query rows; else two are in use and
// two on their way.
template <int kRows>
constexpr int kStages = kRows == 64 ? 3 : 4;

// Where the loading warp is (load.cuh). Kept here as its registers are few.
struct LoadState {
  int sequence, tile, tile_end;  // the next tile to look up, if it is before the end
  int looked_up, placed;         // tiles so far, and those whose places are there
};
constexpr int kPlannedPieces = 256;  // of tiles that are looked up
constexpr int kPlaces = 64;          // of tiles

// kRows: query rows of a tile. A side is a score warpgroup: it has every other tile, whose
// probabilities it leaves in a buffer of its own.
template <typename Format, int kRows>
struct alignas(1024) SharedStorage {
  // K-major in the 128-byte swizzle, 64 columns a chunk.
  uint8_t query[kHeadDim / 64][kRows * kChunkRowBytes];
  uint8_t probabilities[2][kRows * kChunkRowBytes];  // [row][token], the same
  uint8_t ring[kStages<kRows>][Format::kTileBytes];  // raw rows, of a tile at a time
  // By group of columns the bf16 scales of a tile's tokens, times kPlaced: for each half of the
  // tile and lane t of a quad the tokens 2t and 2t + 1 of every eight, one after the other.
  alignas(16) uint16_t scales[2][Format::kScaleGroups + !Format::kScales][kTileTokens];
  float reference[kRows];  // of the piece so far, and what is subtracted for it
  float offset[kRows];
  float warp_rows[kRoleWarps][kRows];  // between the warps of a side; sums of both
  float inverse_sum[kRows];            // of the last piece that is not empty, times kv_scale
  float factor[kSides][kRows];         // of half rows that are to be stored as partial results
  float score_scale;                   // what products are to be multiplied with
  int2 kept[kRoleWarps];            // of each value warp, whose registers are few: see run_values
  int last_left;                    // tokens of the sequence from the last tile of the piece on
  uint32_t query_peak[kRoleWarps];  // largest magnitudes of queries, bf16x2
  alignas(8) uint8_t exponent[kRows][kRoleWarps];  // of a value warp's largest output
  uint8_t rescale[2][kRows];            // the output so far is to be divided by 2 to this power
  uint32_t raised[2];                   // whether it is, for the side that follows
  alignas(4) uint8_t flags[2][kWarps];  // of a tile, by score warp: kRescaled, kHasLargeScales
  uint64_t full[kStages<kRows>];        // loaded
  uint64_t empty[kStages<kRows>];       // all value warps are through with it
  uint64_t probabilities_full[2], probabilities_empty[2];
  uint64_t sums_full, sums_empty;  // inverse_sum
  Cut begin, end;                  // of the part
  RowTile row_tile;
  LoadState loads;
  int32_t next_length;                         // of the sequence after loads.sequence
  alignas(8) int32_t plan[kPlannedPieces][2];  // by tile and piece: token of the block, block
  alignas(
      16) uint4 places[kPlaces];  // of tiles: source; number, ~ if the tile is not one run of bytes
};

constexpr uint8_t kRescaled = 1, kHasLargeScales = 2;

// Where a role is, in one register: two bits of its turn at the buffers of two, the ring's parity,
// the sums' parity, its stage of the ring, whether the tile is its piece's first, and how many
// tiles were before.
template <int kRows>
class Position {
 public:
  __device__ __forceinline__ int stage() const { return bits_ >> 4 & 7; }
  __device__ __forceinline__ uint32_t ring_parity() const { return bits_ >> 2 & 1; }
  __device__ __forceinline__ int buffer() const { return bits_ & 1; }
  __device__ __forceinline__ uint32_t buffer_parity() const { return bits_ >> 1 & 1; }
  __device__ __forceinline__ uint32_t sums_parity() const { return bits_ >> 3 & 1; }

  __device__ __forceinline__ bool first() const { return bits_ & kFirst; }
  __device__ __forceinline__ uint32_t tile() const { return bits_ / kTile; }

  __device__ __forceinline__ void next_tile() {
    bits_ = (bits_ & ~(3u | kFirst)) | ((bits_ + 1) & 3);
    bits_ += kTile + 16;
    if (stage() == kStages<kRows>) bits_ = (bits_ - kStages<kRows> * 16) ^ 4;
  }
  __device__ __forceinline__ void next_piece() { bits_ = (bits_ ^ 8) | kFirst; }

 private:
  static constexpr uint32_t kFirst = 128, kTile = 256;
  uint32_t bits_ = kFirst;
};

// Keeps the compiler from carrying addresses that follow from x, instead of x, through a loop.
__device__ __forceinline__ int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// Which of its role's two warpgroups a thread is in.
__device__ __forceinline__ int reread_side() {
  return reread_thread() % kRoleThreads / kWarpgroupThreads;
}

// Of the rows of a product's N a thread has 2 (lane % 4) and the next of every eight: number i.
__device__ __forceinline__ int query_row(int thread, int i) {
  return thread % 4 * 2 + (i & 1) + (i >> 1) * 8;
}

// Where a product's element is in a thread's registers: of its query row i, and of row
// lane / 4 + 8 m of the warp's 16 of M.
__device__ __forceinline__ constexpr int element(int i, int m) {
  return (i >> 1) * 4 + m * 2 + (i & 1);
}

}  // namespace flashmla::sm90::dense_decode::fp8
