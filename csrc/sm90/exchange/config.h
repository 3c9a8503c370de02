// How long segments may be, and how blocks divide them.
#pragma once

#include <cstdint>

#include "params/peers.h"
#include "sm90/peers/region.h"

namespace flashmla::sm90::exchange {

using namespace peers;

// The most that a device gives all others, its own segment included.
constexpr int64_t kMaxExchangeBytes = 4 * 1024 * 1024;

// The vectors of a segment, those of all arrays one after the other, and of these a block's.
struct Split {
  int64_t vectors, chunk;
  int blocks;
};

constexpr Split split_segment(int64_t vectors) {
  const int blocks = blocks_for(vectors);
  return {vectors, (vectors + blocks - 1) / blocks, blocks};
}

constexpr bool longest_segment_fits() {
  for (int size = 2; size <= kMaxPeers; ++size) {
    const Split split = split_segment(kMaxExchangeBytes / size / kVectorBytes);
    if (split.chunk * size > kRegionVectors) return false;
  }
  return true;
}
static_assert(longest_segment_fits());

}  // namespace flashmla::sm90::exchange
