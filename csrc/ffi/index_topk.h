// index_topk: its attributes, operands and results, and their way into IndexTopkParams.
#pragma once

#include <utility>

#include "ffi/index_keys.h"
#include "params/index_topk.h"
#include "status.h"

namespace flashmla::ffi {

struct IndexTopkAttrs {
  bool causal;
  bool has_scores;  // then q, weights, blocks and first_block may be anything, else scores
  int32_t layer_blocks;
};

template <typename Binding>
auto bind_index_topk(Binding context) {
  return std::move(context)
      .template Arg<AnyBuffer>()  // q
      .template Arg<F32R3>()      // weights
      .template Arg<AnyBuffer>()  // blocks
      .template Arg<F32R3>()      // scores
      .template Arg<I32R2>()      // block_table
      .template Arg<I32R1>()      // cache_seqlens
      .template Arg<I32R0>()      // first_block
      .template Arg<I32R2>()      // cuts
      .template Ret<I32R3>()      // indices
      .template Ret<I32R3>()      // positions
      .template Ret<U8R1>()       // workspace
      .template Attrs<IndexTopkAttrs>();
}

inline Status read_index_topk(AnyBuffer q, F32R3 weights, AnyBuffer blocks, F32R3 scores,
                              I32R2 block_table, I32R1 cache_seqlens, I32R0 first_block, I32R2 cuts,
                              Result<I32R3> indices, Result<I32R3> positions,
                              Result<U8R1> workspace, const IndexTopkAttrs& attrs,
                              IndexTopkParams* params) {
  ExtentChecks checks;
  const auto [b, s_q, topk] =
      checks.read<3>("indices", indices->dimensions(), {"b", "s_q", "topk"});
  const int64_t num_parts = read_num_parts(checks, cuts.dimensions());
  IndexKeys keys = {};
  keys.layer_blocks = attrs.layer_blocks;
  read_index_table(checks, block_table, cache_seqlens, b, keys);
  check_layer_slots(checks, keys.layer_blocks);
  IndexQueryExtents queries = {.b = b, .s_q = s_q};
  if (attrs.has_scores) {
    expect_index_scores(checks, scores.dimensions(), b, s_q, keys);
  } else {
    queries = read_index_queries(checks, q, weights);
    read_index_blocks(checks, blocks, first_block, keys.layer_blocks, keys);
  }
  for (const auto& [name, result] : {std::pair("indices", &indices), {"positions", &positions}}) {
    checks.expect(name, (*result)->dimensions(),
                  {{"b", queries.b}, {"s_q", queries.s_q}, {"topk", topk}});
  }
  if (topk > kMaxTopk) {
    checks.fail("topk must be at most " + std::to_string(kMaxTopk) + ", got " +
                std::to_string(topk));
  }
  if (checks.ok()) checks.int32("b * s_q (query tokens)", b * s_q);

  *params = {.b = checks.int32("b", b),
             .s_q = checks.int32("s_q", s_q),
             .heads = checks.int32("heads", queries.heads),
             .topk = checks.int32("topk", topk),
             .num_parts = checks.int32("num_parts", num_parts),
             .causal = attrs.causal,
             .fp8_queries = queries.fp8,
             .keys = keys,
             .q = q.untyped_data(),
             .weights = weights.typed_data(),
             .scores = attrs.has_scores ? scores.typed_data() : nullptr,
             .cuts = cuts.typed_data(),
             .indices = indices->typed_data(),
             .positions = positions->typed_data(),
             .workspace = workspace->typed_data()};
  checks.expect("workspace", workspace->dimensions(),
                {{"bytes", index_topk_workspace_bytes(*params)}});
  return checks.status();
}

}  // namespace flashmla::ffi

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(flashmla::ffi::IndexTopkAttrs,
                                      ::xla::ffi::StructMember<bool>("causal"),
                                      ::xla::ffi::StructMember<bool>("has_scores"),
                                      ::xla::ffi::StructMember<int32_t>("layer_blocks"));

FLASHMLA_OPERATION(index_topk, IndexTopkParams)
