// The kernel's plan of shared memory; the block's candidates lie behind it.
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

// What is selected: all keys above `key`, and of those equal to it the first `equal`.
struct Threshold {
  uint32_t key;
  int equal;
};

// Keys above the threshold, and equal to it.
struct Counts {
  int above, equal;
};

// Of a block or a warp, and the highest of their keys.
struct Tally {
  int candidates;
  uint32_t highest;
};

// A token that may be selected.
struct Candidate {
  uint32_t key;
  int32_t token;  // of the row
};

struct alignas(16) SharedStorage {
  struct {
    uint32_t counts[kBins];  // of the block's keys by digit
    union {
      uint32_t totals[kBins];  // of all the cluster's
      uint32_t close[kBins];   // keys of the bin in which the threshold is
    };
  } bins;
  uint32_t warp_sums[kWarps];
  Counts warp_counts[kWarps];
  Counts block_counts[kMaxCluster];  // of the cluster
  Tally warp_tallies[2][kWarps];     // of two rounds
  Tally block_tallies[kMaxCluster];
  uint64_t tallies_there, candidates_there;  // mbarriers; the latter in a row's first block
  Found found;
  Threshold threshold;
  int num_close;
};

// Dynamic shared memory: the storage, then candidate_room(topk) candidates, among which a sample of
// the row's scores lies before there are any.
__device__ __forceinline__ Candidate* candidates_of(uint8_t* dynamic_shared) {
  return reinterpret_cast<Candidate*>(dynamic_shared + sizeof(SharedStorage));
}
constexpr int shared_bytes(int topk) {
  return sizeof(SharedStorage) + candidate_room(topk) * sizeof(Candidate);
}
static_assert(shared_bytes(kMaxTopk) <= 232448, "Hopper has 227 KB a block");

}  // namespace flashmla::sm90::index_topk
