// The topk-th highest key, by digits of 11 bits from the highest on. Each block counts its keys by
// digit, and the cluster sums the counts.
#pragma once

#include <climits>

#include "sm90/index_topk/keys.cuh"
#include "sm90/index_topk/sums.cuh"
#include "sm90/ptx/cluster.cuh"

namespace flashmla::sm90::index_topk {

__device__ __forceinline__ void clear_bins(SharedStorage& smem) {
  for (uint32_t i = threadIdx.x * 4; i < kBins; i += kThreads * 4) {
    *reinterpret_cast<uint4*>(&smem.bins[i]) = {};
  }
}

// Adds up the blocks' bins into `all`, each block a share of them, which it sends to all. Every
// block has counted before.
__device__ __forceinline__ void sum_cluster(SharedStorage& smem, uint32_t* all, uint32_t blocks) {
  const uint32_t share = kBins / blocks, rank = cluster_rank();
  cluster_sync();
  for (uint32_t i = threadIdx.x; i < share; i += kThreads) {
    const uint32_t counts = smem_address(&smem.bins[rank * share + i]);
    const uint32_t totals = smem_address(&all[rank * share + i]);
    uint32_t part[kMaxCluster], sum = 0;
#pragma unroll
    for (uint32_t k = 0; k < kMaxCluster; ++k) {
      part[k] = k < blocks ? load_cluster(map_shared(counts, k)) : 0;
    }
#pragma unroll
    for (uint32_t k = 0; k < kMaxCluster; ++k) sum += part[k];
#pragma unroll 4
    for (uint32_t k = 0; k < blocks; ++k) store_cluster(map_shared(totals, k), sum);
  }
  cluster_sync();
}

// By all threads; the bins are full.
__device__ __forceinline__ Found find_bin(SharedStorage& smem, const uint32_t* bins, int need) {
  // A thread's bins, from the highest thread 0's on.
  constexpr int kMine = kBins / kThreads;
  const int first = kBins - kMine - kMine * static_cast<int>(threadIdx.x);
  int sum = 0;
#pragma unroll
  for (int i = 0; i < kMine; i += 4) {
    const uint4 four = *reinterpret_cast<const uint4*>(bins + first + i);
    sum += four.x + four.y + four.z + four.w;
  }
  const int up_to = inclusive_warp_sum(sum);
  if (threadIdx.x == 0) smem.found = {-1, 0, 0};
  const int of_warp = __shfl_sync(~0u, up_to, 31);
  int above = sum_warps(of_warp, smem.warp_sums[0]).x + up_to - sum;
  if (above < need && need <= above + sum) {
    int bin = first + kMine - 1;
    while (above + static_cast<int>(bins[bin]) < need) above += bins[bin--];
    smem.found = {bin, above, static_cast<int>(bins[bin])};
  }
  __syncthreads();
  return smem.found;
}

// By all threads of the `blocks` blocks; bins are clear. totals: memory for the cluster's bins,
// null where there is one block. for_each(visit) visits the block's keys; those below `base` are
// not looked at, no others exceed it by 2^(shift + 11) or more.
template <typename ForEach>
__device__ __forceinline__ Threshold find_threshold(SharedStorage& smem, uint32_t base, int shift,
                                                    int need, uint32_t blocks, uint32_t* totals,
                                                    const ForEach& for_each) {
  for (uint32_t digits = kBins;;) {
    for_each([&](uint32_t key) {
      const uint32_t digit = (key - base) >> shift;
      if (key >= base && digit < digits) atomicAdd(&smem.bins[digit], 1);
    });
    if (blocks > 1) {
      sum_cluster(smem, totals, blocks);
    } else {
      __syncthreads();
    }
    const Found found = find_bin(smem, blocks > 1 ? totals : smem.bins, need);
    if (found.bin < 0) return kAll;  // fewer than needed
    base += static_cast<uint32_t>(found.bin) << shift;
    need -= found.above;
    if (found.within == need) return {score_of(base), INT_MAX};
    if (shift == 0) return {score_of(base), need};
    digits = min(1u << shift, kBins);
    shift = max(shift - 11, 0);
    clear_bins(smem);
    __syncthreads();
  }
}

}  // namespace flashmla::sm90::index_topk
