// Sizes that the sparse decode kernel's roles share, and its arguments.
#pragma once

#include <cstdint>

#include "schedule/pieces.h"
#include "sm90/attention/partial.cuh"
#include "sm90/ptx/warpgroup.h"

namespace flashmla::sm90::sparse {

constexpr int kValueDim = 512;  // d_v
constexpr int kTileTokens = kSplitTile;
constexpr int kSlotTokens = 16;  // rows of a slot of the ring: those of one score warp
constexpr int kTileSlots = kTileTokens / kSlotTokens;
constexpr int kChunkRowBytes = 128;  // 64 16-bit columns
constexpr int kSharedBase = 1024;    // where dynamic shared memory starts: Hopper reserves 1 KB

constexpr int kWarps = kWarpgroupWarps;
// Warpgroups: scores; values of the 64-column tiles 0-2, 4-6, and 3 and 7. The last one also
// gathers.
constexpr int kThreads = 4 * kWarpgroupThreads;
constexpr int kValueWarps = 3 * kWarps;
constexpr int kWideValues = 3, kNarrowValues = 2;  // 64-column tiles of a value warpgroup
constexpr int value_tile_stride(int count) { return count == kWideValues ? 1 : 4; }
constexpr int kScoreBarrier = 1, kValueBarrier = 2;  // named barriers

struct SourceArgs {
  const uint8_t* blocks;
  const int32_t* first_block;
  const int32_t* indices;
  const int32_t* topk_length;
  int64_t block_bytes;
  int64_t last_first_block;  // the largest first block that keeps the layer within the array
  int topk;
  int block_size;
  uint32_t layer_slots;
};

struct KernelArgs {
  SourceArgs main;
  const uint8_t* q;
  const float* attn_sink;
  const int32_t* cuts;
  void* out;
  float* lse;
  float* out_accum;
  float* lse_accum;
  int queries;  // b * s_q: rows of the schedule
  int h_q;
  float scale_log2;  // sm_scale * log2(e)
};

}  // namespace flashmla::sm90::sparse
