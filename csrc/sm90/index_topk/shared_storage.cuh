// The kernel's plan of shared memory; a block's keys lie behind it.
#pragma once

#include "sm90/index_topk/config.h"
#include "sm90/ptx/smem_desc.cuh"

namespace flashmla::sm90::index_topk {

// The bin in which the keys from the highest on become as many as needed; bin -1: they do not.
struct Found {
  int bin;
  int above;   // keys of higher bins
  int within;  // of this one
};

// Keys above the threshold, and equal to it.
struct Counts {
  int above, equal;
};

struct alignas(16) SharedStorage {
  union {
    struct {
      uint32_t counts[kBins];  // of the block's keys by digit
      uint32_t totals[kBins];  // of all the cluster's
    } bins;
    int32_t selected[kMaxTopk];  // the block's, tokens of the row
  };
  uint32_t warp_sums[kWarps];
  Counts warp_counts[kWarps];
  Counts block_counts[kMaxCluster];  // of the cluster
  Found found;
};
static_assert(sizeof(SharedStorage) + kMaxKeys * 4 <= 232448, "Hopper has 227 KB a block");

}  // namespace flashmla::sm90::index_topk
