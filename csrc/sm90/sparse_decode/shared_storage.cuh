// The kernel's plan of shared memory, and where a role is in the ring.
#pragma once

#include "sm90/ptx/smem_desc.cuh"
#include "sm90/sparse_decode/config.h"

namespace flashmla::sm90::sparse {

// kRows: query heads of a tile. Its queries pass through the ring as items of four slots, as tiles
// of tokens do.
template <int kRows>
constexpr int kQueryItems = kRows == 64 ? 2 : 1;
template <int kRows>
constexpr int kSlotHeads = kRows / (kQueryItems<kRows> * kTileSlots);
// As many as there is room for: 82 KB under way keep HBM busy, and up to 8 slots are in use. With
// 16 rows there must be room beside for a block of the merge.
template <int kRows>
constexpr int kSlots = kRows == 64 ? 13 : kRows == 32 ? 17 : 18;

// Where a gathering warp is (gather.cuh). Kept here as its registers are few.
struct GatherState {
  int query, length;      // query token of the next item, and its indices that count
  int tile, tile_end;     // its next tile; equal where the part is at its end
  int queries_left;       // items of queries before the next tile
  int room;               // slots, from the warp's next one on, that may be filled once empty
  uint32_t position;      // RingPosition::packed of the next one
};

template <typename Format, int kRows>
struct alignas(1024) SharedStorage {
  static constexpr int kChunks = Format::kHeadDim / kChunkColumns;
  static constexpr int kSlotBytes =
      kSlotTokens * Format::kRowBytes > kSlotHeads<kRows> * Format::kHeadDim * 2
          ? kSlotTokens * Format::kRowBytes
          : kSlotHeads<kRows> * Format::kHeadDim * 2;
  using Groups = uint8_t[Format::kScaleGroups][kSlotTokens * 2];

  uint8_t query[kChunks][kRows * kChunkRowBytes];      // K-major, 128-byte swizzle
  uint8_t probabilities[2][kRows * kChunkRowBytes];    // [row][token], the same
  uint8_t ring[kSlots<kRows>][kSlotBytes];             // raw rows end to end; or queries
  // Of each slot's tokens the bf16 scales, times kPlaced: the tokens 2t, 2t + 1, 2t + 8, 2t + 9
  // that lane t of a quad multiplies with, one after the other.
  alignas(16) Groups scales[kSlots<kRows>];
  float reference[kRows];          // of the piece so far
  float exchange[kWarps][kRows];   // between the score warps
  float inverse_sum[kRows];        // of the last piece that is not empty, times the sink's share
  float factor[kRows];             // of outputs that are to be stored as partial results
  alignas(16) uint8_t exponent[kRows][16];  // of a value warp's largest output
  uint8_t rescale[2][kRows];                // the output so far is to be divided by 2 to this power
  alignas(4) uint8_t flags[2][kWarps];      // of a tile, by score warp: kRescaled, kLargeScales
  uint32_t valid[kSlots<kRows>];            // bit t: token t of the slot is attended
  uint64_t full[kSlots<kRows>];             // slot gathered
  uint64_t empty[kSlots<kRows>];            // all value warps are through with it
  uint64_t probabilities_full[2], probabilities_empty[2];
  uint64_t sums_full, sums_empty;  // inverse_sum
  const uint8_t* layer;            // its first block
  Cut begin, end;                  // of the part
  GatherState gather[kWarps];
  int32_t next_index[kWarps][kSlotTokens];
};
static_assert(kValueWarps <= 16);

constexpr uint8_t kRescaled = 1, kLargeScales = 2;

// A slot of the ring, and the parity of the ring's round there; in one register.
template <int kCount>
struct RingPosition {
  uint32_t packed = 0;  // 256 * rounds + slot

  __device__ __forceinline__ int slot() const { return packed & 255; }
  __device__ __forceinline__ uint32_t parity() const { return packed >> 8 & 1; }

  __device__ __forceinline__ void advance(int slots = kTileSlots) {
    packed += slots;
    if (slot() >= kCount) packed += 256 - kCount;
  }

  __device__ __forceinline__ RingPosition ahead(int slots) const {
    RingPosition position = *this;
    position.advance(slots);
    return position;
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

// threadIdx.x, read where it stands: what is derived from it is not computed early and kept.
__device__ __forceinline__ int reread_thread() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

// Where a product's element is in a thread's registers: of its query row i, and of row
// lane / 4 + 8 m of the warp's 16 of M.
__device__ __forceinline__ constexpr int element(int i, int m) {
  return (i >> 1) * 4 + m * 2 + (i & 1);
}

}  // namespace flashmla::sm90::sparse
