// The index_topk kernel: a cluster of blocks selects from a row of scores, a block from each share.
//
//   short row: all scores in registers -> the topk-th highest -> slots and positions
//   long row: a sample of it -> a bound that a few more than topk scores reach -> candidates,
//             gathered in the first block -> as a short row
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
  if (args.given) wait_for_prerequisites();
  const int64_t seqlen = args.cache_seqlens[sequence];
  const int length = static_cast<int>(min(max(seqlen, int64_t{0}), args.max_tokens));
  const int seen = max(args.causal ? length - (args.s_q - 1 - query) : length, 0);
  const Slice whole = Slice::of_row(args, row, sequence, seen);
  const bool staged = seen <= kStagedBlocks * 64;
  if (staged && rank == 0) {
    for (int i = threadIdx.x; i * 64 < seen; i += kThreads) smem.blocks[i] = whole.table[i];
  }
  if (blocks > 1) cluster_wait();
  if (!args.given) wait_for_prerequisites();
  launch_dependents();

  Held held;
  Bound bound = kNoBound;
  const bool is_short = seen <= kHeldScores;
  if (is_short) {
    if (rank > 0) return;
    held.load_row(whole);
    if (held.count > args.topk) bound = held.range(smem);
  } else {
    const Slice slice = whole.share(blocks, rank);
    Sample sample(whole, candidates.scores);
    int count = collect(
        smem, slice,
        [&] {
          sample.load_rest(whole);
          bound = guess_bound(smem, sample, seen, args.topk);
          return bound.least;
        },
        candidates);
    const int need = bound.least > kNoBound.least ? args.topk : 0;
    if (blocks > 1) count = gather(smem, count, candidates, blocks, need);
    __syncthreads();
    if (count < need || count > candidates.room) {
      select_row(Output::of_row(args, sequence, query), smem, slice,
                 reinterpret_cast<uint32_t*>(candidates.scores), blocks);
      return;
    }
    if (rank > 0) return;
    held.load_candidates(candidates, count);
  }
  Threshold threshold = kAll;
  if (held.count > args.topk) threshold = refine(smem, held, bound, args.topk);
  const int selected = select_held(smem, held, threshold);
  const Output output = Output::of_row(args, sequence, query);
  const auto staged_block = [&](int token) { return smem.blocks[token >> 6]; };
  if (is_short) {
    write_selected(output, smem, selected, [](int item) { return item; }, staged_block);
  } else {
    write_selected(
        output, smem, selected, [&](int item) { return candidates.tokens[item]; },
        [&](int token) { return staged ? staged_block(token) : output.table[token >> 6]; });
  }
}

}  // namespace flashmla::sm90::index_topk
