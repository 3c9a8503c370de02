// index_scores: its attributes, operands and results, and their way into IndexScoresParams.
#pragma once

#include <utility>

#include "ffi/index_keys.h"
#include "params/index_scores.h"
#include "status.h"

namespace flashmla::ffi {

struct IndexScoresAttrs {
  bool causal;
  int32_t layer_blocks;
};

template <typename Binding>
auto bind_index_scores(Binding context) {
  return std::move(context)
      .template Arg<AnyBuffer>()  // q
      .template Arg<F32R3>()      // weights
      .template Arg<AnyBuffer>()  // blocks
      .template Arg<I32R2>()      // block_table
      .template Arg<I32R1>()      // cache_seqlens
      .template Arg<I32R0>()      // first_block
      .template Arg<I32R2>()      // cuts
      .template Ret<F32R3>()      // scores
      .template Attrs<IndexScoresAttrs>();
}

inline Status read_index_scores(AnyBuffer q, F32R3 weights, AnyBuffer blocks, I32R2 block_table,
                                I32R1 cache_seqlens, I32R0 first_block, I32R2 cuts,
                                Result<F32R3> scores, const IndexScoresAttrs& attrs,
                                IndexScoresParams* params) {
  ExtentChecks checks;
  const IndexQueryExtents queries = read_index_queries(checks, q, weights);
  const int64_t num_parts = read_num_parts(checks, cuts.dimensions());
  IndexKeys keys = {};
  keys.layer_blocks = attrs.layer_blocks;
  read_index_table(checks, block_table, cache_seqlens, queries.b, keys);
  check_layer_slots(checks, keys.layer_blocks);
  read_index_blocks(checks, blocks, first_block, keys.layer_blocks, keys);
  expect_index_scores(checks, scores->dimensions(), queries.b, queries.s_q, keys);

  *params = {.b = checks.int32("b", queries.b),
             .s_q = checks.int32("s_q", queries.s_q),
             .heads = checks.int32("heads", queries.heads),
             .num_parts = checks.int32("num_parts", num_parts),
             .causal = attrs.causal,
             .fp8_queries = queries.fp8,
             .keys = keys,
             .q = q.untyped_data(),
             .weights = weights.typed_data(),
             .cuts = cuts.typed_data(),
             .scores = scores->typed_data()};
  return checks.status();
}

}  // namespace flashmla::ffi

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(flashmla::ffi::IndexScoresAttrs,
                                      ::xla::ffi::StructMember<bool>("causal"),
                                      ::xla::ffi::StructMember<int32_t>("layer_blocks"));

FLASHMLA_OPERATION(index_scores, IndexScoresParams)
