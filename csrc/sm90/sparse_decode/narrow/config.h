// Sizes that the narrow kernel's roles share.
#pragma once

#include "sm90/sparse_decode/config.h"

namespace flashmla::sm90::sparse::narrow {

constexpr int kSlotTokens = kWarpTokens;  // rows of a slot of the ring
constexpr int kTileSlots = kTileTokens / kSlotTokens;
// Warpgroups: scores; values of the 64-column tiles 0-2, 4-6, and 3 and 7. The last one also
// gathers.
constexpr int kValueWarps = 3 * kWarps;
constexpr int kWideValues = 3, kNarrowValues = 2;  // 64-column tiles of a value warpgroup
constexpr int value_tile_stride(int count) { return count == kWideValues ? 1 : 4; }
constexpr int kScoreBarrier = 1, kValueBarrier = 2;  // named barriers

}  // namespace flashmla::sm90::sparse::narrow
