// The index_topk kernel: a cluster of blocks selects from a row of scores, a block from each share.
//
//   scores -> keys, kept in shared memory; counts of the highest digit
//   up to three times: counts of the cluster -> the digit of the topk-th highest; counts of the
//   next keys above and equal, counted by warp, block and cluster -> places -> slots and positions
//
// docs/kernels/indexer.md tells the whole story.
#pragma once

#include "sm90/index_topk/compact.cuh"
#include "sm90/ptx/barrier.cuh"

namespace flashmla::sm90::index_topk {

// Grid: (rows * blocks of a cluster).
__global__ void __launch_bounds__(kThreads, 3) index_topk_kernel(const KernelArgs args) {
  extern __shared__ __align__(16) uint8_t dynamic_shared[];
  auto& smem = *reinterpret_cast<SharedStorage*>(dynamic_shared);
  auto* const keys = reinterpret_cast<uint32_t*>(dynamic_shared + sizeof(SharedStorage));

  clear_bins(smem);
  const uint32_t blocks = cluster_size(), rank = cluster_rank();
  const int64_t row = blockIdx.x / blocks;
  const int64_t sequence = row / args.queries;
  const int query = args.first_query + static_cast<int>(row % args.queries);
  // index_scores let this kernel start when whatever came before it was done: only the scores are
  // to be waited for.
  int seqlen = args.given ? 0 : args.cache_seqlens[sequence];
  __syncthreads();
  wait_for_prerequisites();
  launch_dependents();
  if (args.given) seqlen = args.cache_seqlens[sequence];
  const int64_t length = min(max(int64_t{seqlen}, int64_t{0}), args.max_tokens);
  const int seen = max(int64_t{0}, args.causal ? length - (args.s_q - 1 - query) : length);
  const Slice slice = Slice::of_block(args, row, seen, blocks, rank);
  Threshold threshold{0, 0};  // all
  if (seen > args.topk) {
    load_keys(slice, keys, [&](uint4 four) {
      const auto count = [&](uint32_t key) {
        if (key != 0) atomicAdd(&smem.bins.counts[key >> 21], 1);
      };
      count(four.x), count(four.y), count(four.z), count(four.w);
    });
    threshold = find_threshold(smem, slice, keys, args.topk, blocks);
  } else {
    load_keys(slice, keys, [](uint4) {});
    if (blocks > 1) cluster_sync();  // all are there
    __syncthreads();
  }
  write_selected(args, smem, slice, keys, threshold, blocks,
                 args.block_table + sequence * args.max_blocks,
                 (sequence * args.s_q + query) * args.topk);
}

}  // namespace flashmla::sm90::index_topk
