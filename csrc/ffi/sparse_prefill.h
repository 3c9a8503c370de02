// sparse_prefill: its attribute, operands and results, and their way into SparsePrefillParams.
#pragma once

#include <string>
#include <utility>

#include "ffi/buffers.h"
#include "params/sparse_prefill.h"
#include "status.h"

namespace flashmla::ffi {

struct SparsePrefillAttrs {
  float sm_scale;
};

template <typename Binding>
auto bind_sparse_prefill(Binding context) {
  return std::move(context)
      .template Arg<AnyBuffer>()  // q
      .template Arg<AnyBuffer>()  // kv
      .template Arg<I32R2>()      // indices
      .template Arg<I32R1>()      // topk_length
      .template Arg<F32R1>()      // attn_sink
      .template Ret<AnyBuffer>()  // out
      .template Ret<F32R2>()      // lse
      .template Ret<F32R2>()      // max_logits
      .template Attrs<SparsePrefillAttrs>();
}

inline Status read_sparse_prefill(AnyBuffer q, AnyBuffer kv, I32R2 indices, I32R1 topk_length,
                                  F32R1 attn_sink, Result<AnyBuffer> out, Result<F32R2> lse,
                                  Result<F32R2> max_logits, const SparsePrefillAttrs& attrs,
                                  SparsePrefillParams* params) {
  ExtentChecks checks;
  params->dtype = read_dtype(checks, "q", q.element_type());
  const auto [s_q, h_q, d_qk] = checks.read<3>("q", q.dimensions(), {"s_q", "h_q", "d_qk"});
  const int64_t s_kv = checks.read<3>("kv", kv.dimensions(), {"s_kv", "1", "d_qk"})[0];
  const int64_t topk = checks.read<2>("indices", indices.dimensions(), {"s_q", "topk"})[1];
  const int64_t d_v = checks.read<3>("out", out->dimensions(), {"s_q", "h_q", "d_v"})[2];
  if (!checks.ok()) return checks.status();

  checks.expect("kv", kv.dimensions(), {{"s_kv", s_kv}, {"h_kv", 1}, {"d_qk", d_qk}});
  expect_same_dtype(checks, "kv", kv.element_type(), "q", q.element_type());
  checks.expect("indices", indices.dimensions(), {{"s_q", s_q}, {"topk", topk}});
  checks.expect("topk_length", topk_length.dimensions(), {{"s_q", s_q}});
  checks.expect("attn_sink", attn_sink.dimensions(), {{"h_q", h_q}});
  if (d_v > d_qk) {
    checks.fail("d_v must be at most d_qk, got d_v=" + std::to_string(d_v) +
                " and d_qk=" + std::to_string(d_qk));
  }
  checks.expect("out", out->dimensions(), {{"s_q", s_q}, {"h_q", h_q}, {"d_v", d_v}});
  checks.expect("lse", lse->dimensions(), {{"s_q", s_q}, {"h_q", h_q}});
  checks.expect("max_logits", max_logits->dimensions(), {{"s_q", s_q}, {"h_q", h_q}});
  expect_same_dtype(checks, "out", out->element_type(), "q", q.element_type());
  if (checks.ok()) checks.int32("s_q * h_q (query rows)", s_q * h_q);

  params->s_q = checks.int32("s_q", s_q);
  params->h_q = checks.int32("h_q", h_q);
  params->s_kv = checks.int32("s_kv", s_kv);
  params->d_qk = checks.int32("d_qk", d_qk);
  params->d_v = checks.int32("d_v", d_v);
  params->topk = checks.int32("topk", topk);
  params->sm_scale = attrs.sm_scale;

  params->q = q.untyped_data();
  params->kv = kv.untyped_data();
  params->indices = indices.typed_data();
  params->topk_length = topk_length.typed_data();
  params->attn_sink = attn_sink.typed_data();
  params->out = out->untyped_data();
  params->lse = lse->typed_data();
  params->max_logits = max_logits->typed_data();
  return checks.status();
}

}  // namespace flashmla::ffi

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(flashmla::ffi::SparsePrefillAttrs,
                                      ::xla::ffi::StructMember<float>("sm_scale"));

FLASHMLA_OPERATION(sparse_prefill, SparsePrefillParams)
