// Which columns of a rotary embedding make a pair.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace flashmla {

// The values are the FFI attribute `layout` (jax_flashmla/_limits.py).
enum class RopeLayout : int32_t {
  kInterleaved,    // neighbours, stored as they were
  kDeinterleaved,  // neighbours, stored as all first ones, then all second ones
  kHalf,           // column i and i + half, stored as they were
  kNone,           // nothing is rotated
};
constexpr int kNumRopeLayouts = 4;

// The columns that pair `pair` of `pairs` is read from, and those that it goes to.
struct RopePair {
  int from[2], to[2];
};

FLASHMLA_HOST_DEVICE inline RopePair rope_pair(RopeLayout layout, int pair, int pairs) {
  const int even = 2 * pair, odd = 2 * pair + 1, low = pair, high = pair + pairs;
  switch (layout) {
    case RopeLayout::kDeinterleaved:
      return {{even, odd}, {low, high}};
    case RopeLayout::kHalf:
      return {{low, high}, {low, high}};
    default:
      return {{even, odd}, {even, odd}};
  }
}

// The pair that makes column `column` of 2 * pairs, and whether it is the pair's second.
struct RopeColumn {
  int pair;
  bool second;
};

FLASHMLA_HOST_DEVICE inline RopeColumn rope_column(RopeLayout layout, int column, int pairs) {
  if (layout == RopeLayout::kInterleaved) return {column / 2, column % 2 == 1};
  return {column < pairs ? column : column - pairs, column >= pairs};
}

}  // namespace flashmla
