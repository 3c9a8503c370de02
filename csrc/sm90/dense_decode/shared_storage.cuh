// The shared-memory plan of the dense decode kernel.
#pragma once

#include "config.h"
#include "work.cuh"

namespace flashmla::sm90 {

struct alignas(1024) SharedStorage {
  // Load t (a tile, or a piece's queries on their way), columns 0-511, in slot t % kStages.
  uint8_t latent[kStages][2][kHalfBytes];
  // Load t's columns 512-575 in slot t % 2; a tile's probabilities once its scores are computed.
  uint8_t rope[2][kChunkBytes];
  uint8_t query[kChunks - kQueryChunksInRegisters][kChunkBytes];
  float rescale[2][kTileRows];       // by slot: factor for the output so far
  float inverse_sum[2][kTileRows];   // by parity of the sequence
  uint64_t latent_full[2][kStages];  // loaded; first index: left or right half
  uint64_t rope_full[2];
  uint64_t scores_done[2];           // all warps have read the tile's rope columns
  uint64_t probabilities_stored[2];  // and the rescale factors
  uint64_t values_go[2];             // the tensor cores are free for the tile's value products
  uint64_t load_done[2];             // all warps are through with what was loaded
  RowTile row_tile;
  Cut begin, end;  // of this block's part
  // The loading thread's own state.
  LoadStream stream;
  volatile LoadItem items[2];  // load t in items[t % 2]
};
static_assert(sizeof(SharedStorage) <= 232448, "Hopper has 227 KB a block");

}  // namespace flashmla::sm90
