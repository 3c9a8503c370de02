// The topk-th highest key, by digits of 11 bits from the highest on. Each block counts its keys by
// digit, and the cluster sums the counts.
#pragma once

#include "sm90/index_topk/keys.cuh"
#include "sm90/index_topk/sums.cuh"
#include "sm90/ptx/cluster.cuh"

namespace flashmla::sm90::index_topk {

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

// By all threads of the `blocks` blocks; bins are clear. for_each(visit) visits the block's keys;
// those below `base` are not looked at, no others exceed it by 2^(shift + 11) or more.
template <typename ForEach>
__device__ __forceinline__ Threshold find_threshold(SharedStorage& smem, uint32_t base, int shift,
                                                    int need, uint32_t blocks,
                                                    const ForEach& for_each) {
  for (uint32_t digits = kBins;;) {
    for_each([&](uint32_t key) {
      const uint32_t digit = (key - base) >> shift;
      if (key >= base && digit < digits) atomicAdd(&smem.bins.counts[digit], 1);
    });
    if (blocks > 1) {
      sum_cluster(smem, blocks);
    } else {
      __syncthreads();
    }
    const Found found = find_bin(smem, blocks > 1 ? smem.bins.totals : smem.bins.counts, need);
    if (found.bin < 0) return {0, 0};  // fewer than needed: all
    base += static_cast<uint32_t>(found.bin) << shift;
    need -= found.above;
    if (found.within == need) return {base - 1, 0};
    if (shift == 0) return {base, need};
    digits = min(1u << shift, kBins);
    shift = max(shift - 11, 0);
    clear_bins(smem);
    __syncthreads();
  }
}

}  // namespace flashmla::sm90::index_topk
