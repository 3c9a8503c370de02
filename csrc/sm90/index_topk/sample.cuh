// A guess at what the topk-th highest score is at least, from a sample of the row. Whatever it is,
// the result is right: candidates are counted, and where they are too few or too many, the topk-th
// highest is found without it.
#pragma once

#include "sm90/index_topk/range.cuh"
#include "sm90/index_topk/threshold.cuh"

namespace flashmla::sm90::index_topk {

// Scores of a row at even distances: one of 64 tokens, but at least 512 and at most 4096. (Those of
// blocks outside the layer may be among them.)
struct Sample {
  static constexpr int kFirst = 4;  // in registers; of most rows these are all
  float scores[kFirst];
  float* rest;  // [4096 / kThreads - kFirst][kThreads]; a thread reads its own
  int shift;

  __device__ __forceinline__ int size() const { return 1 << shift; }

  // The first loads go out.
  __device__ __forceinline__ Sample(const Slice& row, float* room) : rest(room) {
    static_assert(candidate_room(1, INT64_MAX) >= 4096 - kFirst * kThreads);
    shift = min(max(25 - __clz(row.count), 9), 12);
#pragma unroll
    for (int k = 0; k < kFirst; ++k) {
      scores[k] = NAN;
      if (k * kThreads < size()) scores[k] = row.scores[token(row, k)];
    }
  }
  __device__ __forceinline__ void load_rest(const Slice& row) {
    for (int k = kFirst; k * kThreads < size(); ++k) {
      rest[(k - kFirst) * kThreads + threadIdx.x] = row.scores[token(row, k)];
    }
  }
  template <typename Visit>
  __device__ __forceinline__ void for_each(const Visit& visit) const {
#pragma unroll
    for (int k = 0; k < kFirst; ++k) {
      if (k * kThreads < size()) visit(scores[k]);
    }
    for (int k = kFirst; k * kThreads < size(); ++k) {
      visit(rest[(k - kFirst) * kThreads + threadIdx.x]);
    }
  }

 private:
  __device__ __forceinline__ int token(const Slice& row, int k) const {
    return static_cast<uint64_t>(k * kThreads + threadIdx.x) * row.count >> shift;
  }
};

// By all threads; bins are clear, and are again. A score that about topk of the row's `seen` and
// four standard deviations more reach, if the sample is like the row. Divides the range of scores
// into bins, then a bin.
__device__ __forceinline__ Bound guess_bound(SharedStorage& smem, const Sample& sample, int seen,
                                             int topk) {
  constexpr int kTurns = 4;
  const float share = static_cast<float>(topk) / seen, mean = share * sample.size();
  const int rank = static_cast<int>(mean + 4 * sqrtf(mean * (1 - share))) + 2;
  const int most = rank + rank / 8 + 1;
  Range scores;
  sample.for_each([&](float score) { scores.add(score); });
  Bound range = scores.of_block(smem);
  Bound bound{-FLT_MAX, range.highest};
#pragma unroll 1
  for (int turn = 0; turn < kTurns; ++turn) {
    const EvenBins bins(range);
    if (!bins.exist()) break;
    sample.for_each([&](float score) { bins.count(smem, bins.place(score)); });
    __syncthreads();
    const Found found = find_bin(smem, smem.bins, rank);
    clear_bins(smem);
    if (found.bin < 0) break;
    bound.least = fmaxf(bins.edge(found.bin), -FLT_MAX);
    if (found.above + found.within <= most) break;
    range = {bound.least, bins.edge(found.bin + 1)};
    __syncthreads();
  }
  return bound;
}

}  // namespace flashmla::sm90::index_topk
