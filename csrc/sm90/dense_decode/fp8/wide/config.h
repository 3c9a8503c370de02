// Sizes that the wide fp8 kernel's roles share, and its arguments.
#pragma once

#include <cuda.h>

#include "sm90/dense_decode/fp8/config.h"

namespace flashmla::sm90::dense_decode::fp8::wide {

constexpr int kTileRows = 64;  // query rows of a block at most
constexpr int kStages = 3;     // tiles in shared memory
constexpr int kLatentChunks = kValueDim / 64;
constexpr int kHalfChunks = kLatentChunks / 2;  // 256 value columns: what one warpgroup accumulates
constexpr int kChunkBytes = kTileTokens * kChunkRowBytes;
// A tile's half in shared memory: eight tokens' four chunks, then the next eight tokens'.
constexpr int kGroupTokens = 8;
constexpr int kTokenGroups = kTileTokens / kGroupTokens;
constexpr int kTokenGroupBytes = kHalfChunks * kGroupTokens * kChunkRowBytes;
constexpr int kHalfBytes = kHalfChunks * kChunkBytes;

// Warpgroups: scores, left values, right values. The latter two bring rows and convert them too:
// each of their warps the tokens of one group.
constexpr int kWideThreads = 3 * kWarpgroupThreads;
constexpr int kValueWarps = 2 * kWarps;
static_assert(kValueWarps == kTokenGroups);
constexpr int kTakeBarrier = 1;  // named barrier of the score warpgroup
// Registers a thread: together the whole file.
constexpr int kWideScoreRegisters = 184;  // 124 of the query, 32 of the scores
constexpr int kWideValueRegisters = 160;  // 128 of the output
static_assert(kWideScoreRegisters + 2 * kWideValueRegisters <= 3 * (65536 / kWideThreads / 8 * 8));

struct WideArgs : KernelArgs {
  // Of eight tokens 512 codes, in boxes of 128 columns; and what follows them in their rows.
  // Coordinates: 0, token of the block, 128 columns, block; 0, token, block.
  CUtensorMap code_map, rest_map;
  // Of `query_box` rows of [b * s_q * h_q] four latent chunks, or the rope chunk.
  CUtensorMap query_half_map, query_rope_map;
  int query_box;               // a multiple of eight
  int entry_step, token_step;  // from a tile to the next: whole blocks, and tokens
};

}  // namespace flashmla::sm90::dense_decode::fp8::wide
