// The kernel's plan of shared memory; the block's candidates lie behind it.
#pragma once

#include <cmath>

#include "sm90/index_topk/config.h"
#include "sm90/ptx/smem_desc.cuh"

namespace flashmla::sm90::index_topk {

// The bin in which the keys from the highest on become as many as needed; bin -1: they do not.
struct Found {
  int bin;
  int above;   // keys of higher bins
  int within;  // of this one
};

// What is selected: all scores above `score`, and of those equal to it the first `equal`.
struct Threshold {
  float score;
  int equal;
};
constexpr Threshold kAll{-INFINITY, 0};

// Scores above the threshold, and equal to it.
struct Counts {
  int above, equal;
};

struct alignas(16) SharedStorage {
  uint32_t below_bins[4];
  union {
    uint32_t bins[kBins];        // how many of the block's scores
    int32_t selected[kMaxTopk];  // items
  };
  int32_t blocks[kStagedBlocks];  // ids, of the row
  float close[kThreads];          // scores of the bin in which the threshold is
  uint32_t warp_sums[2][kWarps];  // of two turns
  uint32_t warp_lowest[kWarps], warp_highest[kWarps];
  Counts warp_counts[kWarps];
  Counts block_counts[kMaxCluster];  // of the cluster
  uint32_t block_candidates[kMaxCluster];
  uint64_t counts_there, candidates_there;  // mbarriers; the latter in a row's first block
  Found found;
  Threshold threshold;
  int num_close;
};

// Tokens that may be selected of a long row, in the order of positions. Once they are given up,
// what the cluster's bins add up to is in their place.
struct Candidates {
  float* scores;    // [room]
  int32_t* tokens;  // [room], of the row
  int room;

  static __device__ __forceinline__ Candidates behind(uint8_t* dynamic_shared, int room) {
    auto* const scores = reinterpret_cast<float*>(dynamic_shared + sizeof(SharedStorage));
    return {scores, reinterpret_cast<int32_t*>(scores + room), room};
  }
};

constexpr int shared_bytes(int room) { return sizeof(SharedStorage) + room * 8; }
static_assert(shared_bytes(candidate_room(kMaxTopk, INT64_MAX)) <= 232448,
              "Hopper has 227 KB a block");

}  // namespace flashmla::sm90::index_topk
