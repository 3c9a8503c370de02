#include "sm90/index_topk/launch.h"

#include <algorithm>
#include <cstdint>
#include <string>

#include "sm90/host/launch.h"
#include "sm90/index_scores/launch.h"
#include "sm90/index_topk/kernel.cuh"

namespace flashmla::sm90 {
namespace index_topk {
namespace {

Status check_supported(const IndexTopkParams& params) {
  if (params.topk < 1 || params.topk > kMaxTopk) {
    return Status::InvalidArgument("the Hopper index_topk kernel takes topk from 1 to " +
                                   std::to_string(kMaxTopk) + ", got " +
                                   std::to_string(params.topk));
  }
  if (int64_t{params.b} * params.s_q * kMaxCluster > INT32_MAX) {
    return Status::InvalidArgument("index_topk takes less than 2^28 query tokens (b * s_q)");
  }
  return require_hopper();
}

// Blocks that share a row: more while a share is more than a block holds at once and all blocks
// have room at once, two on a multiprocessor; or more than half as much, and each has its own.
int choose_cluster(int64_t rows, int64_t tokens, int multiprocessors) {
  int blocks = 1;
  const auto more = [&](int64_t share, int64_t room) {
    return blocks < kMaxCluster && tokens > blocks * share && rows * blocks <= room;
  };
  while (more(kRoundTokens, multiprocessors) || more(kHeldScores, multiprocessors / 2)) blocks *= 2;
  return blocks;
}

// Shared memory for a block, and of a multiprocessor's what is to be asked for.
struct Room {
  size_t block;
  int percent;
};

// Two blocks on a multiprocessor take longer than one, so where there are enough, a block asks for
// more than half of what there is. Short rows' blocks are there before the scores: they need all
// that scoring blocks leave. Longer rows gain more from L1, which their loads go through.
Room choose_room(size_t block, int64_t blocks, int cluster, int multiprocessors) {
  constexpr size_t kMost = 228 * 1024, kMostLong = 100 * 1024;
  if (blocks > multiprocessors) return {block, 72};
  if (cluster == 1) return {std::max(block, kMost / 2 + 1024), 100};
  return {std::max(block, kMostLong / 2 + 1024), 44};
}

Status select(const IndexTopkParams& params, const float* scores, int first_query, int queries,
              int multiprocessors, cudaStream_t stream) {
  const int64_t rows = int64_t{params.b} * queries;
  const int64_t max_tokens = int64_t{params.keys.max_blocks} * kIndexBlockSize;
  const int cluster = choose_cluster(rows, max_tokens, multiprocessors);
  const KernelArgs args{.scores = scores,
                        .block_table = params.keys.block_table,
                        .cache_seqlens = params.keys.cache_seqlens,
                        .indices = params.indices,
                        .positions = params.positions,
                        .max_tokens = max_tokens,
                        .layer_blocks = static_cast<uint32_t>(params.keys.layer_blocks),
                        .max_blocks = params.keys.max_blocks,
                        .s_q = params.s_q,
                        .first_query = first_query,
                        .queries = queries,
                        .topk = params.topk,
                        .room = candidate_room(params.topk, max_tokens),
                        .causal = params.causal,
                        .given = params.scores != nullptr};
  const Room room = choose_room(shared_bytes(args.room), rows * cluster, cluster, multiprocessors);
  return launch(index_topk_kernel,
                {.grid = dim3(static_cast<unsigned>(rows * cluster)),
                 .block = kThreads,
                 .shared_bytes = room.block,
                 .dependent = true,
                 .most_shared = true,
                 .cluster = cluster,
                 .shared_percent = room.percent},
                stream, "index_topk", args);
}

}  // namespace
}  // namespace index_topk

Status run_index_topk(const IndexTopkParams& params, cudaStream_t stream) {
  using namespace index_topk;
  if (int64_t{params.b} * params.s_q == 0) return Status::Ok();
  if (Status status = check_supported(params); !status.ok()) return status;
  int multiprocessors = 0;
  if (Status s = count_multiprocessors(&multiprocessors); !s.ok()) return s;
  if (params.scores != nullptr) {
    return select(params, params.scores, 0, params.s_q, multiprocessors, stream);
  }
  const IndexScoresParams scoring{.b = params.b,
                                  .s_q = params.s_q,
                                  .heads = params.heads,
                                  .num_parts = params.num_parts,
                                  .causal = params.causal,
                                  .fp8_queries = params.fp8_queries,
                                  .keys = params.keys,
                                  .q = params.q,
                                  .weights = params.weights,
                                  .cuts = params.cuts,
                                  .scores = nullptr};
  auto* const scores = static_cast<float*>(params.workspace);
  const int at_once = static_cast<int>(index_topk_queries(params));
  for (int first = 0; first < params.s_q; first += at_once) {
    const int queries = std::min(at_once, params.s_q - first);
    Status s = run_index_scores_of(scoring, first, queries, /*fill=*/false, scores, stream);
    if (!s.ok()) return s;
    s = select(params, scores, first, queries, multiprocessors, stream);
    if (!s.ok()) return s;
  }
  return Status::Ok();
}

}  // namespace flashmla::sm90
