// Sizes that the wide kernel's roles share, and its arguments.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "sm90/ptx/warpgroup.h"
#include "sm90/sparse_decode/config.h"

namespace flashmla::sm90::sparse::wide {

constexpr int kRows = 64;  // query heads of a tile
constexpr int kPlans = 4;  // tiles whose rows are known
constexpr int kChunkBytes = kTileTokens * kChunkRowBytes;
constexpr int kLatentChunks = kValueDim / 64;
constexpr int kGroups = 4;  // of value columns, 128 each: a unit's
// With a ring, the group that is converted, scored and freed as number `step`: by turns of the two
// value warpgroups', which free theirs side by side.
constexpr int group_of(int step) { return step % 2 * 2 + step / 2; }
constexpr int kQuarters = 4;  // of a tile: sixteen tokens each, by which a buffer is freed
constexpr int kQuarterTokens = kTileTokens / kQuarters;
constexpr int kRopeRows = kQuarterTokens / kWarps;  // of a quarter, whose rope columns a warp has
constexpr int kValueWarps = 2 * kWarps;
// Warpgroups: scores, left values, right values, conversion; and the registers of their threads,
// together the whole file. Where there is a ring two units are converted ahead.
constexpr int kValueRegisters = 160;
constexpr int score_registers(bool ring) { return ring ? 72 : 80; }
constexpr int convert_registers(bool ring) {
  return 65536 / 128 - 2 * kValueRegisters - score_registers(ring);
}

struct KernelArgs {
  sparse::KernelArgs common;
  // All columns of `query_box` rows of [b * s_q * h_q]; coordinates 0, row, 0.
  CUtensorMap query_map;
  int query_box;  // a multiple of eight
};

}  // namespace flashmla::sm90::sparse::wide
