// -inf for the tiles that no item of work covers: those past what a query tile sees.
#pragma once

#include <cmath>

#include "sm90/index_scores/config.h"

namespace flashmla::sm90::index_scores {

// By the scoring warps of all blocks, while the first keys are on their way. A warp takes 4096
// tokens of a query at a time.
template <int kQueries, int kScoringWarps>
__device__ void fill_unseen(const KernelArgs& args) {
  constexpr int kSegment = 4096;
  const int lane = threadIdx.x % 32;
  const int64_t max_tokens = int64_t{args.max_blocks} * kTileTokens;
  const int segments = (max_tokens + kSegment - 1) / kSegment;
  const int64_t units = int64_t{args.b} * args.queries * segments;
  const int64_t block = blockIdx.x + (blockIdx.y + int64_t{blockIdx.z} * gridDim.y) * gridDim.x;
  const int64_t stride = int64_t{gridDim.x} * gridDim.y * gridDim.z * kScoringWarps;
  for (int64_t unit = block * kScoringWarps + threadIdx.x / 32; unit < units; unit += stride) {
    const int64_t row = unit / segments;
    const int begin = unit % segments * kSegment;
    const int length = args.clamp_length(args.cache_seqlens[row / args.queries]);
    const int query = row % args.queries;
    const int last = min(query / kQueries * kQueries + kQueries, args.queries) - 1;
    const int tiles = num_tiles(args.seen_tokens(length, args.first_query + last));
    const int end = min(max_tokens, int64_t{begin} + kSegment);
    float4* const scores = reinterpret_cast<float4*>(args.scores + row * max_tokens);
    for (int i = max(begin, tiles * kTileTokens) / 4 + lane; i < end / 4; i += 32) {
      scores[i] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY};
    }
  }
}

}  // namespace flashmla::sm90::index_scores
