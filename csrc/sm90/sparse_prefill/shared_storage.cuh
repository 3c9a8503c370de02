// The kernel's plan of shared memory.
#pragma once

#include "sm90/attention/work.cuh"
#include "sm90/ptx/smem_desc.cuh"
#include "sm90/sparse_prefill/config.h"

namespace flashmla::sm90::sparse_prefill {

using Ring = RingIndex<kStages>;

// Where a gathering warp is (gather.cuh). Kept here as its registers are few.
struct LoadState {
  int query, tile;  // the next load; tile -1: the heads; query s_q or more: none
  int length;       // indices of `query` that count
};

struct alignas(1024) SharedStorage {
  // Load t, a tile or a query token's heads on their way, in slot t % kStages: columns 0-511 ...
  uint8_t latent[kStages][2][kHalfBytes];
  // ... and 512-575, if there are; a tile's probabilities once its scores are computed.
  uint8_t rope[kStages][kChunkBytes];
  uint8_t query_rope[kChunkBytes];
  uint8_t query_step[2][kTileRows][16];     // columns 496-511: eight, then the other eight, by row
  uint8_t rescale[kStages][kTileRows];      // divide the output so far by 2 to this power
  uint8_t attended[kStages][kTokenGroups];  // bit t: token t of the group
  float out_factor[2][kTileRows];           // 1 / sum, alternating between query tokens
  LoadState load_state[kGatherWarps];
  // Of a score warp, counting query tokens that are not empty: its own.
  uint8_t odd_query[kWarpgroupWarps];
  // Barriers, one per slot.
  uint64_t full[kStages];
  uint64_t scores_done[kStages];           // all score warps have read the tile's rope columns
  uint64_t probabilities_stored[kStages];  // and the rescale powers
  uint64_t values_go[kStages];  // the tensor cores are free for the tile's value products
  uint64_t load_done[kStages];  // all warps are through with what was loaded
  // In pairs of blocks:
  uint64_t half_full[kStages];  // this block's half of the tile is there
  uint64_t peer_free[kStages];  // the peer's slot may be written
  int to_send;                  // the sending thread's own: slot and parity of a half; -1: none
};
static_assert(sizeof(SharedStorage) <= 232448, "Hopper has 227 KB a block");

// This block's head tile and its query tokens, which lie gridDim.y apart.
__device__ __forceinline__ int first_head() { return blockIdx.x * kTileRows; }
__device__ __forceinline__ int count_heads(const KernelArgs& args) {
  return min(args.h_q - first_head(), kTileRows);
}

}  // namespace flashmla::sm90::sparse_prefill
