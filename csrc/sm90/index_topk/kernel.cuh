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
__global__ void __launch_bounds__(kThreads, 2) index_topk_kernel(const KernelArgs args) {
  extern __shared__ __align__(16) uint8_t dynamic_shared[];
  auto& smem = *reinterpret_cast<SharedStorage*>(dynamic_shared);
  Candidate* const candidates = candidates_of(dynamic_shared);

  clear_bins(smem);
  const uint32_t blocks = cluster_size(), rank = cluster_rank();
  if (blocks > 1) prepare_gather(smem, blocks);
  const int64_t row = blockIdx.x / blocks;
  const int64_t sequence = row / args.queries;
  const int query = args.first_query + static_cast<int>(row % args.queries);
  // index_scores let this kernel start when whatever came before it was done: only the scores are
  // to be waited for.
  int seqlen = args.given ? 0 : args.cache_seqlens[sequence];
  wait_for_prerequisites();
  launch_dependents();
  if (args.given) seqlen = args.cache_seqlens[sequence];
  const int64_t length = min(max(int64_t{seqlen}, int64_t{0}), args.max_tokens);
  const int seen = max(int64_t{0}, args.causal ? length - (args.s_q - 1 - query) : length);
  const int room = candidate_room(args.topk);

  const Slice slice = Slice::of_block(args, row, seen, blocks, rank);
  const Sample sample = Sample::of_row(candidates, seen);
  const bool all_are_candidates = seen <= args.topk;
  if (!all_are_candidates) sample.load(Slice::of_block(args, row, seen, 1, 0), seen);
  uint32_t bound = kLeastKey;
  Tally tally = collect(
      smem, slice,
      [&] {
        if (!all_are_candidates) bound = guess_bound(smem, sample, seen, args.topk);
        return bound;
      },
      candidates, room);
  const int need = bound > kLeastKey ? args.topk : 0;
  if (blocks > 1) tally = gather(smem, tally, candidates, blocks, need, room);
  __syncthreads();
  const int64_t out = (sequence * args.s_q + query) * args.topk;
  const Output output{.indices = args.indices + out,
                      .positions = args.positions + out,
                      .table = args.block_table + sequence * args.max_blocks,
                      .topk = args.topk};
  if (tally.candidates < need || tally.candidates > room) {
    select_row(output, smem, slice, blocks);
    return;
  }
  if (rank > 0) return;
  Threshold threshold{0, 0};  // all
  if (tally.candidates > args.topk) {
    threshold = refine(smem, candidates, tally.candidates, bound, tally.highest, args.topk);
  }
  write_candidates(output, smem, candidates, tally.candidates, threshold);
}

}  // namespace flashmla::sm90::index_topk
