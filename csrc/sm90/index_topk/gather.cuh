// The candidates of the blocks that share a row, brought together without a barrier of the cluster.
#pragma once

#include "sm90/index_topk/shared_storage.cuh"
#include "sm90/ptx/barrier.cuh"
#include "sm90/ptx/cluster.cuh"

namespace flashmla::sm90::index_topk {

// Before anything is sent; then `cluster_wait`.
__device__ __forceinline__ void prepare_gather(SharedStorage& smem, uint32_t blocks) {
  if (threadIdx.x == 0) {
    const uint32_t there = smem_address(&smem.counts_there);
    mbarrier_init(there, 1);
    mbarrier_init(smem_address(&smem.candidates_there), 1);
    mbarrier_init_fence();
    mbarrier_arrive_expect(there, blocks * sizeof(uint32_t));
  }
  __syncwarp();
  cluster_arrive_relaxed();
}

// All blocks' candidates, one after the other, into the first block's room, if there is room for
// them and they are at least `need`. Returns how many they are, in all blocks. The first block's
// threads have to synchronise before they read.
__device__ __forceinline__ int gather(SharedStorage& smem, int mine, const Candidates& candidates,
                                      uint32_t blocks, int need) {
  const uint32_t rank = cluster_rank(), lane = threadIdx.x % 32;
  if (threadIdx.x < blocks) {
    store_async(map_shared(smem_address(&smem.block_candidates[rank]), threadIdx.x), mine,
                map_shared(smem_address(&smem.counts_there), threadIdx.x));
  }
  mbarrier_wait(smem_address(&smem.counts_there), 0);
  const int of_rank = lane < blocks ? smem.block_candidates[lane] : 0;
  const int all = __reduce_add_sync(~0u, of_rank);
  if (all < need || all > candidates.room) return all;
  const uint32_t there = smem_address(&smem.candidates_there);
  if (rank == 0) {
    if (threadIdx.x == 0) mbarrier_arrive_expect(there, (all - mine) * 8);
    mbarrier_wait(there, 0);
    return all;
  }
  const int earlier = __reduce_add_sync(~0u, lane < rank ? of_rank : 0);
  const uint32_t scores = map_shared(smem_address(candidates.scores + earlier), 0);
  const uint32_t tokens = map_shared(smem_address(candidates.tokens + earlier), 0);
  const uint32_t mapped_there = map_shared(there, 0);
  __syncthreads();  // the block's candidates are stored
  for (int i = threadIdx.x; i < mine; i += kThreads) {
    store_async(scores + i * 4, __float_as_uint(candidates.scores[i]), mapped_there);
    store_async(tokens + i * 4, candidates.tokens[i], mapped_there);
  }
  return all;
}

}  // namespace flashmla::sm90::index_topk
