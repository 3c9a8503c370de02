// The index_topk kernel: a cluster of blocks selects from a row of scores, a block from each share.
//
//   a sample of the row -> a bound that a few more than topk scores reach -> candidates, gathered
//   in the first block -> the topk-th highest of them -> slots and positions
//
// docs/kernels/indexer.md tells the whole story.
#pragma once

#include "sm90/index_topk/collect.cuh"
#include "sm90/index_topk/gather.cuh"
#include "sm90/index_topk/refine.cuh"
#include "sm90/index_topk/sample.cuh"
#include "sm90/index_topk/select_row.cuh"

namespace flashmla::sm90::index_topk {

// Grid: (rows * blocks of a cluster).
__global__ void __launch_bounds__(kThreads, 2)
    index_topk_kernel(const __grid_constant__ KernelArgs args) {
  extern __shared__ __align__(16) uint8_t dynamic_shared[];
  auto& smem = *reinterpret_cast<SharedStorage*>(dynamic_shared);
  const Candidates candidates = Candidates::behind(dynamic_shared, args.room);

  clear_bins(smem);
  const uint32_t blocks = cluster_size(), rank = cluster_rank();
  if (blocks > 1) prepare_gather(smem, blocks);
  const uint32_t row = blockIdx.x >> (__ffs(blocks) - 1), queries = args.queries;
  const uint32_t sequence = row / queries;
  const int query = args.first_query + row % queries;
  // index_scores let this kernel start when whatever came before it was done: only the scores are
  // to be waited for.
  int seqlen = args.given ? 0 : args.cache_seqlens[sequence];
  wait_for_prerequisites();
  launch_dependents();
  if (args.given) seqlen = args.cache_seqlens[sequence];
  const int length = static_cast<int>(min(max(int64_t{seqlen}, int64_t{0}), args.max_tokens));
  const int seen = max(args.causal ? length - (args.s_q - 1 - query) : length, 0);

  const Slice whole = Slice::of_row(args, row, sequence, seen);
  const Slice slice = whole.share(blocks, rank);
  for (int i = threadIdx.x * 32; i * 64 < seen; i += kThreads * 32) {  // looked up at the end
    asm volatile("prefetch.global.L2 [%0];" ::"l"(whole.table + i));
  }
  const Sample sample = Sample::of_row(candidates.scores, seen);
  const bool all_are_candidates = seen <= args.topk;
  Sample::Asked asked{};
  if (!all_are_candidates) asked = sample.ask(whole);
  Bound bound = kNoBound;
  int count = collect(
      smem, slice,
      [&] {
        if (!all_are_candidates) {
          sample.load(whole, asked);
          bound = guess_bound(smem, sample, seen, args.topk);
        }
        return bound.least;
      },
      candidates);
  const int need = bound.least > kNoBound.least ? args.topk : 0;
  if (blocks > 1) count = gather(smem, count, candidates, blocks, need);
  __syncthreads();
  const int64_t out = (int64_t{sequence} * args.s_q + query) * args.topk;
  const Output output{.indices = args.indices + out,
                      .positions = args.positions + out,
                      .table = whole.table,
                      .topk = args.topk};
  if (count < need || count > candidates.room) {
    select_row(output, smem, slice, reinterpret_cast<uint32_t*>(candidates.scores), blocks);
    return;
  }
  if (rank > 0) return;
  load_scores(whole, candidates, count);
  Threshold threshold = kAll;
  if (count > args.topk) threshold = refine(smem, candidates, count, bound, args.topk);
  write_candidates(output, smem, candidates, count, threshold);
}

}  // namespace flashmla::sm90::index_topk
