// How a mailbox is laid out.
#pragma once

#include <cstdint>

namespace flashmla::sm90::peers {

constexpr int kThreads = 256;
constexpr int kMaxBlocks = 128;
constexpr int64_t kVectorBytes = 16;

// A thread block's part of a mailbox, once for each of two epochs.
constexpr int64_t kRegionBytes = 64 * 1024;
constexpr int64_t kRegionVectors = kRegionBytes / kVectorBytes;
constexpr int64_t kMailboxBytes = int64_t{kMaxBlocks} * 2 * kRegionBytes;

// Blocks for so many vectors, of which each gets ceil(vectors / blocks).
constexpr int blocks_for(int64_t vectors) {
  const int64_t blocks = (vectors + kThreads - 1) / kThreads;
  return static_cast<int>(blocks < kMaxBlocks ? blocks : kMaxBlocks);
}

}  // namespace flashmla::sm90::peers
