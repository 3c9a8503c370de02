// The wide kernel's plan of registers and shared memory.
#pragma once

#include "sm90/attention/work.cuh"
#include "sm90/dense_decode/load.cuh"
#include "sm90/dense_decode/wide/load_stream.cuh"

namespace flashmla::sm90::dense_decode::wide {

constexpr int kThreads = kComputeThreads;
constexpr int kStages = 3;                                  // tiles in shared memory
constexpr int kLoadingThread = 2 * kWarpgroupThreads + 32;  // in the right value warpgroup
// Registers a thread: together the whole file.
constexpr int kScoreRegisters = 184;  // 124 of the query, 32 of the scores
constexpr int kValueRegisters = 160;  // 128 of the output
static_assert(kScoreRegisters + 2 * kValueRegisters <= 3 * (65536 / kThreads / 8 * 8));

using Ring = RingIndex<kStages>;

struct alignas(1024) SharedStorage {
  // Load t, a tile or a piece's queries on their way, in slot t % kStages: columns 0-511 ...
  uint8_t latent[kStages][2][kHalfBytes];
  // ... and 512-575; a tile's probabilities once its scores are computed.
  uint8_t rope[kStages][kChunkBytes];
  uint8_t query_rope[kChunkBytes];
  uint8_t query_step[2][kTileRows][16];  // columns 496-511: eight, then the other eight, by row
  uint8_t rescale[kStages][kTileRows];   // divide the output so far by 2 to this power
  float inverse_sum[2][kTileRows];       // alternating between pieces that are not empty
  // Barriers, one per slot.
  uint64_t half_full[2][kStages];  // left or right half loaded
  uint64_t rope_full[kStages];
  uint64_t scores_done[kStages];           // all warps have read the tile's rope columns
  uint64_t probabilities_stored[kStages];  // and the rescale factors
  uint64_t values_go[kStages];  // the tensor cores are free for the tile's value products
  uint64_t load_done[kStages];  // all warps are through with what was loaded
  RowTile row_tile;
  Cut begin, end;  // of this block's part
  // The loading thread's own state.
  LoadStream stream;
  volatile LoadItem item;  // the next to be loaded
};
static_assert(sizeof(SharedStorage) <= 232448, "Hopper has 227 KB a block");

}  // namespace flashmla::sm90::dense_decode::wide
