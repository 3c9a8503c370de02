// Which way a message takes.
#pragma once

#include <cstdint>

#include "params/peers.h"
#include "sm90/peers/region.h"

namespace flashmla::sm90::all_reduce_sum {

using namespace peers;

// The longest message.
constexpr int64_t kMaxMessageBytes = 2 * 1024 * 1024;

// Bytes that a device may send more in one round, for which the second one's latency is saved. Four
// H200s, us in one round and in two: 112 KB 5.4 and 6.7, 448 KB 9.8 and 8.0.
constexpr int64_t kSecondRoundBytes = 448 * 1024;

// How `vectors` are divided. One round: every device sends all of its x to every other. Two: it
// sends each other the segment that this one sums, and gets the sums.
struct Split {
  bool two_rounds;
  int blocks;
  int64_t segment;  // vectors that one device sums: all of them in one round
  int64_t chunk;    // of these, vectors of one block
};

constexpr Split split_rounds(int64_t vectors, int size, bool two_rounds) {
  const int64_t segment = two_rounds ? (vectors + size - 1) / size : vectors;
  const int blocks = blocks_for(segment);
  return {two_rounds, blocks, segment, (segment + blocks - 1) / blocks};
}

// Vectors of a region that a block uses.
constexpr int64_t region_vectors(const Split& split, int size) {
  return split.chunk * size * (split.two_rounds ? 2 : 1);
}

// The way a message takes. Two rounds send 2 (size - 1) / size of it from each device, one round
// size - 1 times.
constexpr Split split_message(int64_t bytes, int size) {
  const int64_t vectors = (bytes + kVectorBytes - 1) / kVectorBytes;
  const int64_t more = (size - 1) * (size - 2) * bytes / size;
  const Split one = split_rounds(vectors, size, false);
  if (more <= kSecondRoundBytes && region_vectors(one, size) <= kRegionVectors) return one;
  return split_rounds(vectors, size, true);
}

constexpr bool longest_message_fits() {
  for (int size = 2; size <= kMaxPeers; ++size) {
    const Split split = split_rounds(kMaxMessageBytes / kVectorBytes, size, true);
    if (region_vectors(split, size) > kRegionVectors) return false;
  }
  return true;
}
static_assert(longest_message_fits());

}  // namespace flashmla::sm90::all_reduce_sum
