// The shared-memory plan of the dense decode kernel.
#pragma once

#include "config.h"
#include "work.cuh"

namespace flashmla::sm90 {

struct alignas(1024) SharedStorage {
  uint8_t latent[kStages][2][kHalfBytes];  // tile t, columns 0-511, in slot t % kStages
  // Tile t's rope columns in slot t % 2 and, once its scores are computed, its probabilities.
  uint8_t rope[2][kChunkBytes];
  uint8_t query[kChunks - kQueryChunksInRegisters][kChunkBytes];
  float rescale[2][kTileRows];   // by tile parity: factor for the output so far
  float inverse_sum[2][kTileRows];  // by parity of the piece's last tile
  uint64_t latent_full[2][kStages];  // loaded; first index: left or right half
  uint64_t rope_full[2];
  uint64_t scores_done[2];           // all warps have read the tile's rope columns
  uint64_t probabilities_stored[2];  // and the rescale factors
  uint64_t values_go[2];             // the tensor cores are free for the tile's value products
  uint64_t values_done[2];  // both value warpgroups are through with the tile
  // The loading thread's own state.
  TileStream stream;
  int rope_block;  // of the latent tile loaded last
  bool rope_pending;
  int row_offset[kTileRows];  // of each packed row within [s_q, h_q]; -1 past the last row
};
static_assert(sizeof(SharedStorage) <= 232448, "Hopper has 227 KB a block");

}  // namespace flashmla::sm90
