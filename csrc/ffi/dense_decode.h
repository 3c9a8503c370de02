// dense_decode: its attributes, operands and results, and their way into DenseDecodeParams.
#pragma once

#include <utility>

#include "ffi/buffers.h"
#include "params/dense_decode.h"
#include "status.h"

namespace flashmla::ffi {

// XLA refuses a call whose attributes are missing, misspelt, superfluous or of another type.
struct DenseDecodeAttrs {
  float sm_scale;
  bool causal;
  int32_t format, block_size, h_kv, tile_rows;
};

template <typename Binding>
auto bind_dense_decode(Binding context) {
  return std::move(context)
      .template Arg<AnyBuffer>()  // q
      .template Arg<AnyBuffer>()  // blocks
      .template Arg<I32R2>()      // block_table
      .template Arg<I32R1>()      // cache_seqlens
      .template Arg<I32R2>()      // seen
      .template Arg<I32R2>()      // cuts
      .template Arg<F32R0>()      // kv_scale
      .template Ret<AnyBuffer>()  // out
      .template Ret<F32R3>()      // lse
      .template Ret<F32R4>()      // out_accum
      .template Ret<F32R3>()      // lse_accum
      .template Attrs<DenseDecodeAttrs>();
}

inline Status read_dense_decode(AnyBuffer q, AnyBuffer blocks, I32R2 block_table,
                                I32R1 cache_seqlens, I32R2 seen, I32R2 cuts, F32R0 kv_scale,
                                Result<AnyBuffer> out, Result<F32R3> lse, Result<F32R4> out_accum,
                                Result<F32R3> lse_accum, const DenseDecodeAttrs& attrs,
                                DenseDecodeParams* params) {
  ExtentChecks checks;
  params->dtype = read_dtype(checks, "q", q.element_type());
  const auto [b, s_q, h_q, d_qk] = checks.read<4>("q", q.dimensions(), {"b", "s_q", "h_q", "d_qk"});
  const BlocksExtents cache =
      read_blocks(checks, blocks, attrs.format, attrs.block_size, "blocks", attrs.h_kv);
  const auto [table_b, max_blocks] =
      checks.read<2>("block_table", block_table.dimensions(), {"b", "max_blocks"});
  const auto [out_b, out_s_q, out_h_q, d_v] =
      checks.read<4>("out", out->dimensions(), {"b", "s_q", "h_q", "d_v"});
  const int64_t num_parts = read_num_parts(checks, cuts.dimensions());
  if (!checks.ok()) return checks.status();

  if (h_q % cache.h_kv != 0) {
    checks.fail("h_q must be a multiple of h_kv, got h_q=" + std::to_string(h_q) +
                " and h_kv=" + std::to_string(cache.h_kv));
  }
  if (d_v > d_qk) {
    checks.fail("d_v must be at most d_qk, got d_v=" + std::to_string(d_v) +
                " and d_qk=" + std::to_string(d_qk));
  }
  const bool dense = cache.format == Format::kDense;
  if (dense) expect_same_dtype(checks, "blocks", blocks.element_type(), "q", q.element_type());
  if (dense ? cache.row_stride < d_qk : cache.row_stride != d_qk) {
    checks.fail("blocks must have rows of q's d_qk=" + std::to_string(d_qk) +
                (dense ? " or wider, got " : ", got ") + std::to_string(cache.row_stride));
  }
  checks.expect("block_table", block_table.dimensions(), {{"b", b}, {"max_blocks", max_blocks}});
  checks.expect("cache_seqlens", cache_seqlens.dimensions(), {{"b", b}});
  const bool has_seen = seen.dimensions()[1] != 1;
  checks.expect("seen", seen.dimensions(), {{"b", b}, {"s_q or 1", has_seen ? s_q : 1}});
  checks.expect("out", out->dimensions(), {{"b", b}, {"s_q", s_q}, {"h_q", h_q}, {"d_v", d_v}});
  checks.expect("lse", lse->dimensions(), {{"b", b}, {"s_q", s_q}, {"h_q", h_q}});
  checks.expect("out_accum", out_accum->dimensions(),
                {{"2 * num_parts", 2 * num_parts}, {"s_q", s_q}, {"h_q", h_q}, {"d_v", d_v}});
  checks.expect("lse_accum", lse_accum->dimensions(),
                {{"2 * num_parts", 2 * num_parts}, {"s_q", s_q}, {"h_q", h_q}});
  check_table_reach(checks, max_blocks, cache.block_size);
  if (checks.ok()) checks.int32("b * s_q * h_q (query rows)", b * s_q * h_q);
  if (checks.ok()) {
    checks.int32("2 * num_parts * s_q * h_q (workspace rows)", 2 * num_parts * s_q * h_q);
  }

  params->b = checks.int32("b", b);
  params->s_q = checks.int32("s_q", s_q);
  params->h_q = checks.int32("h_q", h_q);
  params->h_kv = checks.int32("h_kv", cache.h_kv);
  params->d_qk = checks.int32("d_qk", d_qk);
  params->d_v = checks.int32("d_v", d_v);
  params->num_blocks = cache.num_blocks;
  params->block_size = attrs.block_size;
  params->max_blocks = checks.int32("max_blocks", max_blocks);
  params->num_parts = checks.int32("num_parts", num_parts);
  params->tile_rows = attrs.tile_rows;
  params->format = cache.format;
  params->block_bytes = cache.block_bytes;
  params->row_stride = cache.row_stride;
  expect_same_dtype(checks, "out", out->element_type(), "q", q.element_type());
  params->sm_scale = attrs.sm_scale;
  params->causal = attrs.causal;

  params->q = q.untyped_data();
  params->blocks = blocks.untyped_data();
  params->block_table = block_table.typed_data();
  params->cache_seqlens = cache_seqlens.typed_data();
  params->seen = has_seen ? seen.typed_data() : nullptr;
  params->cuts = cuts.typed_data();
  params->kv_scale = kv_scale.typed_data();
  params->out = out->untyped_data();
  params->lse = lse->typed_data();
  params->out_accum = out_accum->typed_data();
  params->lse_accum = lse_accum->typed_data();
  return checks.status();
}

}  // namespace flashmla::ffi

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(flashmla::ffi::DenseDecodeAttrs,
                                      ::xla::ffi::StructMember<float>("sm_scale"),
                                      ::xla::ffi::StructMember<bool>("causal"),
                                      ::xla::ffi::StructMember<int32_t>("format"),
                                      ::xla::ffi::StructMember<int32_t>("block_size"),
                                      ::xla::ffi::StructMember<int32_t>("h_kv"),
                                      ::xla::ffi::StructMember<int32_t>("tile_rows"));

FLASHMLA_OPERATION(dense_decode, DenseDecodeParams)
