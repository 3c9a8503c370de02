// sparse_decode: its attributes, operands and results, and their way into SparseDecodeParams.
#pragma once

#include <utility>

#include "ffi/buffers.h"
#include "params/sparse_decode.h"
#include "status.h"

namespace flashmla::ffi {

struct SparseDecodeAttrs {
  float sm_scale;
  int32_t format, block_size, layer_blocks;
  bool has_extra;  // else the extra operands and attributes may be anything
  int32_t extra_format, extra_block_size, extra_layer_blocks;
};

template <typename Binding>
auto bind_sparse_decode(Binding context) {
  return std::move(context)
      .template Arg<AnyBuffer>()  // q
      .template Arg<AnyBuffer>()  // blocks
      .template Arg<I32R3>()      // indices
      .template Arg<I32R2>()      // topk_length
      .template Arg<I32R0>()      // first_block
      .template Arg<AnyBuffer>()  // extra_blocks
      .template Arg<I32R3>()      // extra_indices
      .template Arg<I32R2>()      // extra_topk_length
      .template Arg<I32R0>()      // extra_first_block
      .template Arg<F32R1>()      // attn_sink
      .template Arg<F32R0>()      // kv_scale
      .template Arg<I32R2>()      // cuts
      .template Ret<AnyBuffer>()  // out
      .template Ret<F32R3>()      // lse
      .template Ret<F32R3>()      // out_accum
      .template Ret<F32R2>()      // lse_accum
      .template Attrs<SparseDecodeAttrs>();
}

// The operands of one cache, and their names in messages.
struct SparseOperands {
  const AnyBuffer& blocks;
  const I32R3& indices;
  const I32R2& topk_length;
  const I32R0& first_block;
  int32_t format, block_size, layer_blocks;
  const char *blocks_name, *indices_name, *length_name;
};

inline SparseSource read_sparse_source(ExtentChecks& checks, const SparseOperands& from,
                                       const AnyBuffer& q, int64_t b, int64_t s_q, int64_t d_qk) {
  const BlocksExtents cache =
      read_blocks(checks, from.blocks, from.format, from.block_size, from.blocks_name);
  const int64_t topk =
      checks.read<3>(from.indices_name, from.indices.dimensions(), {"b", "s_q", "topk"})[2];
  if (!checks.ok()) return {};
  const std::string name = from.blocks_name;
  const bool dense = cache.format == Format::kDense;
  if (dense) {
    expect_same_dtype(checks, from.blocks_name, from.blocks.element_type(), "q", q.element_type());
  }
  if (cache.h_kv != 1) checks.fail(name + " must have h_kv=1, got " + std::to_string(cache.h_kv));
  if (dense ? cache.row_stride < d_qk : cache.row_stride != d_qk) {
    checks.fail(name + " must have rows of q's d_qk=" + std::to_string(d_qk) +
                (dense ? " or wider, got " : ", got ") + std::to_string(cache.row_stride));
  }
  if (from.layer_blocks < 1 || from.layer_blocks > cache.num_blocks) {
    checks.fail(name + " must have at least layer_blocks=" + std::to_string(from.layer_blocks) +
                " blocks, and that at least 1, got " + std::to_string(cache.num_blocks));
  }
  checks.expect(from.indices_name, from.indices.dimensions(),
                {{"b", b}, {"s_q", s_q}, {"topk", topk}});
  checks.expect(from.length_name, from.topk_length.dimensions(), {{"b", b}, {"s_q", s_q}});
  if (checks.ok()) {
    checks.int32("layer_blocks * block_size (slots)", int64_t{from.layer_blocks} * from.block_size);
  }
  return {.format = cache.format,
          .num_blocks = cache.num_blocks,
          .block_bytes = cache.block_bytes,
          .row_stride = cache.row_stride,
          .block_size = from.block_size,
          .topk = checks.int32("topk", topk),
          .layer_blocks = from.layer_blocks,
          .first_block = from.first_block.typed_data(),
          .blocks = from.blocks.untyped_data(),
          .indices = from.indices.typed_data(),
          .topk_length = from.topk_length.typed_data()};
}

inline Status read_sparse_decode(AnyBuffer q, AnyBuffer blocks, I32R3 indices, I32R2 topk_length,
                                 I32R0 first_block, AnyBuffer extra_blocks, I32R3 extra_indices,
                                 I32R2 extra_topk_length, I32R0 extra_first_block, F32R1 attn_sink,
                                 F32R0 kv_scale, I32R2 cuts, Result<AnyBuffer> out,
                                 Result<F32R3> lse, Result<F32R3> out_accum,
                                 Result<F32R2> lse_accum, const SparseDecodeAttrs& attrs,
                                 SparseDecodeParams* params) {
  ExtentChecks checks;
  params->dtype = read_dtype(checks, "q", q.element_type());
  const auto [b, s_q, h_q, d_qk] = checks.read<4>("q", q.dimensions(), {"b", "s_q", "h_q", "d_qk"});
  const auto [out_b, out_s_q, out_h_q, d_v] =
      checks.read<4>("out", out->dimensions(), {"b", "s_q", "h_q", "d_v"});
  const int64_t num_parts = read_num_parts(checks, cuts.dimensions());
  if (!checks.ok()) return checks.status();

  params->main =
      read_sparse_source(checks,
                         {blocks, indices, topk_length, first_block, attrs.format, attrs.block_size,
                          attrs.layer_blocks, "blocks", "indices", "topk_length"},
                         q, b, s_q, d_qk);
  params->extra = {};
  if (attrs.has_extra) {
    params->extra =
        read_sparse_source(checks,
                           {extra_blocks, extra_indices, extra_topk_length, extra_first_block,
                            attrs.extra_format, attrs.extra_block_size, attrs.extra_layer_blocks,
                            "extra_blocks", "extra_indices", "extra_topk_length"},
                           q, b, s_q, d_qk);
  }
  if (d_v > d_qk) {
    checks.fail("d_v must be at most d_qk, got d_v=" + std::to_string(d_v) +
                " and d_qk=" + std::to_string(d_qk));
  }
  checks.expect("attn_sink", attn_sink.dimensions(), {{"h_q", h_q}});
  checks.expect("out", out->dimensions(), {{"b", b}, {"s_q", s_q}, {"h_q", h_q}, {"d_v", d_v}});
  checks.expect("lse", lse->dimensions(), {{"b", b}, {"s_q", s_q}, {"h_q", h_q}});
  checks.expect("out_accum", out_accum->dimensions(),
                {{"2 * num_parts", 2 * num_parts}, {"h_q", h_q}, {"d_v", d_v}});
  checks.expect("lse_accum", lse_accum->dimensions(),
                {{"2 * num_parts", 2 * num_parts}, {"h_q", h_q}});
  expect_same_dtype(checks, "out", out->element_type(), "q", q.element_type());
  if (checks.ok()) checks.int32("b * s_q * h_q (query rows)", b * s_q * h_q);
  if (checks.ok()) checks.int32("2 * num_parts * h_q (workspace rows)", 2 * num_parts * h_q);

  params->b = checks.int32("b", b);
  params->s_q = checks.int32("s_q", s_q);
  params->h_q = checks.int32("h_q", h_q);
  params->d_qk = checks.int32("d_qk", d_qk);
  params->d_v = checks.int32("d_v", d_v);
  params->num_parts = checks.int32("num_parts", num_parts);
  params->sm_scale = attrs.sm_scale;

  params->q = q.untyped_data();
  params->kv_scale = kv_scale.typed_data();
  params->attn_sink = attn_sink.typed_data();
  params->cuts = cuts.typed_data();
  params->out = out->untyped_data();
  params->lse = lse->typed_data();
  params->out_accum = out_accum->typed_data();
  params->lse_accum = lse_accum->typed_data();
  return checks.status();
}

}  // namespace flashmla::ffi

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(flashmla::ffi::SparseDecodeAttrs,
                                      ::xla::ffi::StructMember<float>("sm_scale"),
                                      ::xla::ffi::StructMember<int32_t>("format"),
                                      ::xla::ffi::StructMember<int32_t>("block_size"),
                                      ::xla::ffi::StructMember<int32_t>("layer_blocks"),
                                      ::xla::ffi::StructMember<bool>("has_extra"),
                                      ::xla::ffi::StructMember<int32_t>("extra_format"),
                                      ::xla::ffi::StructMember<int32_t>("extra_block_size"),
                                      ::xla::ffi::StructMember<int32_t>("extra_layer_blocks"));

FLASHMLA_OPERATION(sparse_decode, SparseDecodeParams)
