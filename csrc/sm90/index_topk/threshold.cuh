// The topk-th highest key of a row, by digits from the highest on: 11, 11 and 10 bits. Each block
// counts its keys by digit, and the cluster sums the counts.
#pragma once

#include "sm90/index_topk/keys.cuh"
#include "sm90/ptx/cluster.cuh"

namespace flashmla::sm90::index_topk {

// What is selected: all keys above `key`, and of those equal to it the first `equal`.
struct Threshold {
  uint32_t key;
  int equal;
};

__device__ __forceinline__ int inclusive_warp_sum(int x) {
#pragma unroll
  for (int i = 1; i < 32; i *= 2) {
    const int lower = __shfl_up_sync(~0u, x, i);
    if (static_cast<int>(threadIdx.x % 32) >= i) x += lower;
  }
  return x;
}

__device__ __forceinline__ void clear_bins(SharedStorage& smem) {
  static_assert(kBins == 4 * kThreads);
  reinterpret_cast<uint4*>(smem.bins.counts)[threadIdx.x] = {};
}

// Adds up the blocks' counts, each block a share of the bins, which it sends to all. Every block
// has counted before, and has the totals after.
__device__ __forceinline__ void sum_cluster(SharedStorage& smem, uint32_t blocks) {
  constexpr uint32_t kAtOnce = 8;  // loads
  const uint32_t share = kBins / blocks, rank = cluster_rank();
  cluster_sync();
  for (uint32_t i = threadIdx.x; i < share; i += kThreads) {
    const uint32_t counts = smem_address(&smem.bins.counts[rank * share + i]);
    const uint32_t totals = smem_address(&smem.bins.totals[rank * share + i]);
    uint32_t sum = 0;
    for (uint32_t first = 0; first < blocks; first += kAtOnce) {
      uint32_t part[kAtOnce];
#pragma unroll
      for (uint32_t k = 0; k < kAtOnce; ++k) {
        part[k] = first + k < blocks ? load_cluster(map_shared(counts, first + k)) : 0;
      }
#pragma unroll
      for (uint32_t k = 0; k < kAtOnce; ++k) sum += part[k];
    }
#pragma unroll 4
    for (uint32_t k = 0; k < blocks; ++k) store_cluster(map_shared(totals, k), sum);
  }
  cluster_sync();
}

// By all threads; `totals` are there.
__device__ __forceinline__ Found find_bin(SharedStorage& smem, const uint32_t* totals, int need) {
  // A thread's four bins, from the highest thread 0's on.
  const int first = kBins - 4 - 4 * static_cast<int>(threadIdx.x);
  const uint4 four = *reinterpret_cast<const uint4*>(totals + first);
  const int count[4] = {static_cast<int>(four.w), static_cast<int>(four.z),
                        static_cast<int>(four.y), static_cast<int>(four.x)};
  const int sum = count[0] + count[1] + count[2] + count[3];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int above = inclusive_warp_sum(sum);
  if (lane == 31) smem.warp_sums[warp] = above;
  if (threadIdx.x == 0) smem.found = {-1, 0, 0};
  __syncthreads();
  const int lower_warps = lane < warp ? smem.warp_sums[lane] : 0;
  above += __reduce_add_sync(~0u, lower_warps) - sum;
  if (above < need && need <= above + sum) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (above < need && need <= above + count[i]) smem.found = {first + 3 - i, above, count[i]};
      above += count[i];
    }
  }
  __syncthreads();
  return smem.found;
}

// By all threads of the cluster. The slice's keys have been counted by their highest digit.
__device__ __forceinline__ Threshold find_threshold(SharedStorage& smem, const Slice& slice,
                                                    const uint32_t* keys, int topk,
                                                    uint32_t blocks) {
  uint32_t prefix = 0;  // of the topk-th highest key
  int need = topk;      // the how manieth it is of those with this prefix
  int shift = 21;
  for (;;) {
    if (blocks > 1) {
      sum_cluster(smem, blocks);
    } else {
      __syncthreads();
    }
    const Found found = find_bin(smem, blocks > 1 ? smem.bins.totals : smem.bins.counts, need);
    if (found.bin < 0) return {0, 0};  // fewer than topk: all
    const int bits = shift == 0 ? 10 : 11;
    prefix = prefix << bits | found.bin;
    need -= found.above;
    if (found.within == need) return {(prefix << shift) - 1, 0};
    if (shift == 0) return {prefix, need};

    clear_bins(smem);
    __syncthreads();
    const int above = shift, next = shift == 21 ? 10 : 0;
    const uint32_t mask = next == 0 ? 1023 : kBins - 1;
    read_keys(slice, keys, [&](uint4 four) {
      const auto count = [&](uint32_t key) {
        if (key >> above == prefix) atomicAdd(&smem.bins.counts[key >> next & mask], 1);
      };
      count(four.x), count(four.y), count(four.z), count(four.w);
    });
    shift = next;
  }
}

}  // namespace flashmla::sm90::index_topk
