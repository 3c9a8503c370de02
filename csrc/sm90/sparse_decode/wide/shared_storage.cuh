// The wide kernel's plan of shared memory.
#pragma once

#include <cstddef>

#include "sm90/ptx/smem_desc.cuh"
#include "sm90/sparse_decode/wide/config.h"
#include "sm90/sparse_decode/wide/formats.cuh"
#include "sm90/sparse_decode/wide/unit.cuh"
#include "sm90/sparse_decode/work.cuh"

namespace flashmla::sm90::sparse::wide {

constexpr int kSharedBytes = 232448;  // that a block can have

constexpr int larger(int a, int b) { return a > b ? a : b; }

// A row of zeros of any format.
alignas(16) __device__ const uint8_t kZeroRow[1152] = {};

enum class Source : int { kNone, kMain, kExtra };  // kNone: past the part's last tile

// How a tile's rows reach its buffer of 16-bit rows.
enum class Feed {
  kRing,   // into rings in shared memory; converted from there
  kPeers,  // into registers; a cluster's two blocks convert half of them each
  kCopy    // they are 16-bit rows already
};

// A unit on its way: its pieces as the lanes have them, the scales row by row, the rope columns.
template <typename Format>
struct UnitBytes {
  static constexpr int kPiece = Format::kCodes == Codes::kE2M1 ? 8 : 16;
  static constexpr int kCodes = kUnitPieces * 32 * kPiece;
  static constexpr int kRowScales =
      Format::kTwoPlanes ? Format::kScaleBytes : UnitScales<Format>::kWarpBytes;
  static constexpr int kScales = UnitScales<Format>::kNone ? 0 : kQuarterTokens * kRowScales;
  static constexpr int kAll = kCodes + kScales + RopeUnit<Format>::kBytes;
};

// Sixteen whole rows on their way: four units' pieces, the scales row by row, v4's rope columns.
template <typename Format>
struct RowsBytes {
  static constexpr int kUnit = UnitBytes<Format>::kCodes;
  static constexpr int kRowScales =
      Format::kTwoPlanes ? Format::kScaleBytes : UnitScales<Format>::kWarpBytes * kGroups;
  static constexpr int kScalesAt = kGroups * kUnit;
  static constexpr int kTailAt =
      kScalesAt + (UnitScales<Format>::kNone ? 0 : kQuarterTokens * kRowScales);
  static constexpr bool kTail = Format::kCodeColumns < kValueDim;
  static constexpr int kAll = kTailAt + (kTail ? kQuarterTokens * kChunkRowBytes : 0);
};

// Main, Extra: the two caches' formats, of one d_qk.
template <typename Main, typename Extra, Feed kFeed>
struct alignas(1024) SharedStorage {
  static constexpr bool kRing = kFeed == Feed::kRing;
  static constexpr int kBlocks = kFeed == Feed::kPeers ? 2 : 1;  // of a cluster
  static constexpr int kBuffers = kRing ? 1 : 2;                 // of a tile each
  static constexpr int kChunks = Main::kHeadDim / kChunkColumns;
  static constexpr bool kRope = kChunks > kLatentChunks;  // a chunk that is no value
  static_assert(Main::kHeadDim == Extra::kHeadDim);
  // Where probabilities are: in the place of a tile's rope columns, once its scores are computed,
  // or in a place of their own.
  static constexpr bool kInRope = kRope && !kRing;
  static constexpr int kSlotBytes =
      kRing ? larger(RowsBytes<Main>::kAll, RowsBytes<Extra>::kAll)
            : larger(UnitBytes<Main>::kAll, UnitBytes<Extra>::kAll) -
                  (kInRope ? RopeUnit<Main>::kBytes : 0);           // no room for these
  static constexpr int kSlots = kRing ? 2 : kFeed == Feed::kPeers;  // of a converting warp
  // A tile's parts by which its buffer is filled, and freed. With a ring: the first two groups of
  // columns, and one by one the others; both halves. Else the whole tile, and quarters.
  static constexpr int kFullParts = kRing ? 3 : 1;
  static constexpr int kEmptyParts = kRing ? 2 : kQuarters;
  // With a ring the columns that are no values have places of their own, as long as rows.
  static constexpr int kKeyChunks = kRing ? kLatentChunks : kChunks;

  uint8_t query[kChunks][kChunkBytes];  // [row][64 columns], K-major in the 128-byte swizzle
  uint8_t keys[kBuffers][kKeyChunks][kChunkBytes];                 // [token][64 columns], the same
  uint8_t own_probabilities[kInRope ? 0 : kBuffers][kChunkBytes];  // [row][token]
  uint8_t rope[kRing && kRope ? kSlots : 0][kChunkBytes];          // as keys
  // Each converting warp's rows on their way.
  uint8_t raw[kSlots == 0 ? 0 : kWarps][kSlots][kSlotBytes];
  uint8_t rescale[kBuffers][kRows];  // divide the output so far by 2 to this power
  // Of the last three pieces that are not empty: the next but one's may be written while the value
  // warpgroups still store.
  float inverse_sum[3][kRows];
  // Of the tiles that are planned: bit t % 32 of word t / 32 for token t.
  alignas(8) uint32_t attended[kPlans][kTileTokens / 32];
  uint64_t query_full;
  uint64_t keys_full[kBuffers][kFullParts];
  // The cluster's value warps are through with a quarter's tokens. At the block that converts the
  // quarter; the last one, whose tokens are the last, at all blocks. With a ring: they
  // are through with the first halves of their columns, and with all.
  uint64_t keys_empty[kBuffers][kEmptyParts];
  uint64_t scores_done[kBuffers];           // all score warps have read the tile
  uint64_t probabilities_stored[kBuffers];  // and the rescale powers
  uint64_t values_go[kBuffers];             // the tensor cores are free for the value products
  const uint8_t* layer[2];                  // first blocks of main and extra
  Cut begin, end;                           // of the part

  // Buffer and parity of the part's tile `tile`.
  static __device__ __forceinline__ int buffer_of(uint32_t tile) { return tile % kBuffers; }
  static __device__ __forceinline__ uint32_t parity_of(uint32_t tile) {
    return tile / kBuffers & 1;
  }

  // Addresses for descriptors, which are the same in all blocks of a cluster: constants.
  static __device__ __forceinline__ uint32_t query_at() {
    return kSharedBase + offsetof(SharedStorage, query);
  }
  static __device__ __forceinline__ uint32_t keys_at(int buffer, int chunk) {
    return kSharedBase + offsetof(SharedStorage, keys) +
           (buffer * kKeyChunks + chunk) * kChunkBytes;
  }
  static __device__ __forceinline__ uint32_t rope_at(int slot) {
    return kSharedBase + offsetof(SharedStorage, rope) + slot * kChunkBytes;
  }
  static __device__ __forceinline__ uint32_t probabilities_at(int buffer) {
    if constexpr (kInRope) return keys_at(buffer, kLatentChunks);
    return kSharedBase + offsetof(SharedStorage, own_probabilities) + buffer * kChunkBytes;
  }

  __device__ __forceinline__ uint8_t* probabilities(int buffer) {
    if constexpr (kInRope)
      return keys[buffer][kLatentChunks];
    else
      return own_probabilities[buffer];
  }
};

}  // namespace flashmla::sm90::sparse::wide
