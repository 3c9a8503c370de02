#include "sm90/index_scores/launch.h"

#include <algorithm>
#include <cstdint>
#include <string>

#include "sm90/host/launch.h"
#include "sm90/host/tensor_map.h"
#include "sm90/index_scores/kernels.h"
#include "sm90/ptx/tma.cuh"

namespace flashmla::sm90 {
namespace index_scores {
namespace {

Status check_supported(const IndexScoresParams& params) {
  if (params.heads < 1 || params.heads > kMaxIndexHeads) {
    return Status::InvalidArgument("the Hopper index_scores kernel takes 1 to 64 heads, got " +
                                   std::to_string(params.heads));
  }
  if (params.keys.num_blocks < 1 || params.keys.num_blocks > INT32_MAX) {
    return Status::InvalidArgument("blocks must hold 1 to 2^31 - 1 blocks, got num_blocks = " +
                                   std::to_string(params.keys.num_blocks));
  }
  if (int64_t{params.b} * params.s_q > INT32_MAX ||
      int64_t{params.keys.max_blocks} * kIndexBlockSize > INT32_MAX) {
    return Status::InvalidArgument(
        "index_scores takes less than 2^31 query tokens (b * s_q), and tokens of a sequence");
  }
  return require_hopper();
}

Status make_key_map(const IndexKeys& keys, CUtensorMap* map) {
  const uint64_t bytes = keys.block_bytes, blocks = keys.num_blocks;
  return make_tensor_map(keys.blocks, CU_TENSOR_MAP_DATA_TYPE_UINT8, CU_TENSOR_MAP_SWIZZLE_128B,
                         {{kIndexColumns, 1, kIndexColumns},
                          {kIndexBlockSize, kIndexColumns, kIndexBlockSize},
                          {blocks, bytes, 1},
                          {1, bytes, 1}},
                         map);
}

Status make_query_map(const IndexScoresParams& params, Variant variant, CUtensorMap* map) {
  const uint64_t item = params.fp8_queries ? 1 : 2, row = kIndexColumns * item;
  const uint64_t heads = params.heads, tokens = uint64_t(params.b) * params.s_q;
  const auto type =
      params.fp8_queries ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const uint32_t columns = 128 / item;  // of 128 bytes
  return make_tensor_map(params.q, type, CU_TENSOR_MAP_SWIZZLE_128B,
                         {{columns, item, columns},
                          {heads, row, static_cast<uint32_t>(variant.heads)},
                          {tokens, heads * row, static_cast<uint32_t>(variant.queries)},
                          {item, 128, static_cast<uint32_t>(item)}},
                         map);
}

// The smallest product that holds all query tokens, or the largest.
Variant choose_variant(const IndexScoresParams& params) {
  Variant variant{params.heads <= 32 ? 32 : 64, 1};
  const int most = max_queries(params.fp8_queries, variant.heads);
  while (variant.queries < params.s_q && variant.queries < most) variant.queries *= 2;
  return variant;
}

// Tiles of an item of work where there are many query tiles: about eight items a block, which even
// out what causal queries do not see; but enough to be worth loading queries for.
int choose_chunk(int64_t query_tiles, int max_blocks, int multiprocessors) {
  const int64_t tiles = query_tiles * max_blocks;
  return static_cast<int>(std::clamp<int64_t>(tiles / (8 * multiprocessors), 8, 64));
}

}  // namespace
}  // namespace index_scores

Status run_index_scores_of(const IndexScoresParams& params, int first_query, int queries, bool fill,
                           float* scores, cudaStream_t stream) {
  using namespace index_scores;
  if (int64_t{params.b} * queries * params.keys.max_blocks == 0) return Status::Ok();
  if (Status status = check_supported(params); !status.ok()) return status;
  int multiprocessors = 0;
  if (Status s = count_multiprocessors(&multiprocessors); !s.ok()) return s;
  const Variant variant = choose_variant(params);
  const IndexKeys& keys = params.keys;
  KernelArgs args{
      .key_map = {},
      .query_map = {},
      .blocks = static_cast<const uint8_t*>(keys.blocks),
      .first_block = keys.first_block,
      .block_table = keys.block_table,
      .cache_seqlens = keys.cache_seqlens,
      .weights = params.weights,
      .cuts = params.cuts,
      .scores = scores,
      .block_bytes = keys.block_bytes,
      .last_first_block = std::max<int64_t>(keys.num_blocks - keys.layer_blocks, 0),
      .key_hint = kEvictFirst,
      .layer_blocks = static_cast<uint32_t>(std::min(keys.layer_blocks, keys.num_blocks)),
      .max_blocks = keys.max_blocks,
      .b = params.b,
      .s_q = params.s_q,
      .heads = params.heads,
      .first_query = first_query,
      .queries = queries,
      .chunk_tiles = 0,
      .causal = params.causal,
      .fill = fill};
  if (Status s = make_key_map(keys, &args.key_map); !s.ok()) return s;
  if (Status s = make_query_map(params, variant, &args.query_map); !s.ok()) return s;

  const int query_tiles = (queries + variant.queries - 1) / variant.queries;
  // Keys that several blocks read must stay in L2 until the last has read them.
  if (query_tiles > 1) args.key_hint = kEvictNormal;
  dim3 grid(query_tiles, params.num_parts);
  if (query_tiles > 2) {
    args.chunk_tiles =
        choose_chunk(int64_t{params.b} * query_tiles, keys.max_blocks, multiprocessors);
    grid = dim3(multiprocessors);
  }
  const auto launch_kernel = params.fp8_queries ? launch_fp8 : launch_bf16;
  return launch_kernel(args, variant, grid, stream);
}

Status run_index_scores(const IndexScoresParams& params, cudaStream_t stream) {
  return run_index_scores_of(params, 0, params.s_q, /*fill=*/true, params.scores, stream);
}

}  // namespace flashmla::sm90
