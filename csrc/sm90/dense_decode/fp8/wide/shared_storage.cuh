// The wide fp8 kernel's plan of shared memory.
#pragma once

#include "sm90/attention/work.cuh"
#include "sm90/dense_decode/fp8/formats.cuh"
#include "sm90/dense_decode/fp8/wide/config.h"
#include "sm90/ptx/smem_desc.cuh"
#include "sm90/ptx/thread.cuh"

namespace flashmla::sm90::dense_decode::fp8::wide {

using Ring = RingIndex<kStages>;
using Value = V32::Value;  // of keys and values, and of probabilities

// What a value warp loads next.
enum class LoadKind : uint8_t { kNone, kQueries, kTile };

// Where a value warp's loads are.
struct LoadState {
  int sequence;
  int tiles_left;    // of the piece
  int left;          // tokens of the sequence, from the warp's in the next tile on
  int entry;         // of the block table, of the next tile's tokens
  int token;         // of the block
  int block;         // or on its way
  int next_length;   // of the next sequence, or on its way
  uint16_t brought;  // tiles
  int8_t rows;       // of the last load that are the sequence's; kNoTile if it is no tile
  LoadKind kind;     // of the next load
};
constexpr int kNoTile = -1;

struct alignas(1024) WideStorage {
  // Load t, a tile or a piece's queries on their way, in slot t % kStages: columns 0-511 ...
  uint8_t latent[kStages][2][kHalfBytes];
  // ... and 512-575; a tile's probabilities once its scores are computed.
  uint8_t rope[kStages][kChunkBytes];
  uint8_t query_rope[kChunkBytes];
  uint8_t query_step[2][kTileRows][16];  // columns 496-511: eight, then the other eight, by row
  uint8_t rescale[kStages][kTileRows];   // divide the output so far by 2 to this power
  float inverse_sum[kTileRows];          // of the piece
  LoadState loads[kValueWarps];
  int kept[kValueWarps];                   // a value warp's sequence: its registers are few
  uint64_t brought[2][kValueWarps];        // a warp's raw rows, of every other tile
  uint64_t full[kStages];                  // loaded, and converted
  uint64_t scores_done[kStages];           // all score warps have read the tile's rope columns
  uint64_t probabilities_stored[kStages];  // and the rescale powers; or the queries have been taken
  uint64_t values_go[kStages];  // the tensor cores are free for the tile's value products
  uint64_t load_done[kStages];  // the value warps are through with what was loaded
  Cut begin, end;               // of the part
};
static_assert(sizeof(WideStorage) <= 232448, "Hopper has 227 KB a block");

// The query rows of this block, of [s_q, h_q].
__device__ __forceinline__ int first_query_row() { return blockIdx.x * kTileRows; }
__device__ __forceinline__ int count_query_rows(const WideArgs& args) {
  return min(args.rows - first_query_row(), kTileRows);
}

}  // namespace flashmla::sm90::dense_decode::fp8::wide
