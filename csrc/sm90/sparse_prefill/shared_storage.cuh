// The kernel's plan of shared memory.
#pragma once

#include "sm90/attention/work.cuh"
#include "sm90/ptx/smem_desc.cuh"
#include "sm90/ptx/thread.cuh"
#include "sm90/sparse_prefill/config.h"

namespace flashmla::sm90::sparse_prefill {

using Ring = RingIndex<kStages>;

struct alignas(1024) SharedStorage {
  // Load t, a tile or a query token's heads on their way, in slot t % kStages:
  // columns 0-511 ...
  uint8_t latent[kStages][2][kHalfBytes];
  // ... and 512-575, if there are; a tile's probabilities once its scores are
  // computed.
  uint8_t rope[kStages][kChunkBytes];
  uint8_t query_rope[kChunkBytes];
  uint8_t query_step[2][kTileRows][16];     // columns 496-511: eight, then the
                                            // other eight, by row
  uint8_t rescale[kStages][kTileRows];      // divide the output so far by 2 to this power
  uint8_t attended[kStages][kTokenGroups];  // bit t: token t of the group
  float out_factor[2][kTileRows];           // 1 / sum, alternating between query tokens
  uint8_t odd_query[kThreads / 32];         // a warp's own: counts query tokens that are not empty
  // Barriers, one per slot, or one for all loads in turn.
  uint64_t full[kStages];                  // the load, and which tokens are attended
  uint64_t scores_done;                    // all score warps have read the tile's rope columns
  uint64_t probabilities_stored[kStages];  // and the rescale powers; or the
                                           // heads have been taken
  uint64_t values_go[kStages];             // the tensor cores are free for the tile's value
                                           // products
  uint64_t load_done[kStages];             // the value warps are through with what was loaded
};
static_assert(sizeof(SharedStorage) <= 232448, "Hopper has 227 KB a block");

// Parity of a barrier that serves all loads in turn.
__device__ __forceinline__ uint32_t parity_of(Ring ring) { return (ring.slot ^ ring.parity) & 1; }

// This block's head tile and its query tokens, which lie args.query_stride apart.
__device__ __forceinline__ int first_head() { return blockIdx.x * kTileRows; }
__device__ __forceinline__ int count_heads(const KernelArgs& args) {
  return min(args.h_q - first_head(), kTileRows);
}

// Row of [s_q, h_q] of this block's head `head`; there are less than 2^31.
__device__ __forceinline__ uint32_t result_row(const KernelArgs& args, int query, int head) {
  return query * args.h_q + first_head() + head;
}

}  // namespace flashmla::sm90::sparse_prefill
