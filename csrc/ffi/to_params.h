// From FFI buffers and attributes to an operation's params struct, with every extent that a kernel
// relies on held against the others. Values (block ids, lengths, cuts) are not looked at.
#pragma once

#include <cstdint>
#include <string>

#include "ffi/attrs.h"
#include "ffi/bindings.h"
#include "ffi/extents.h"
#include "params/cache_append.h"
#include "params/dense_decode.h"
#include "params/make_schedule.h"
#include "schedule/plan.h"
#include "status.h"

namespace flashmla::ffi {

// The element type of a buffer that must hold bf16, f16 or f32.
inline DType read_dtype(ExtentChecks& checks, const char* buffer, xla::ffi::DataType got) {
  if (got == xla::ffi::BF16) return DType::kBFloat16;
  if (got == xla::ffi::F16) return DType::kFloat16;
  if (got != xla::ffi::F32) {
    checks.fail(std::string(buffer) + " must be bf16, f16 or f32, got XLA element type " +
                std::to_string(static_cast<int>(got)));
  }
  return DType::kFloat32;
}

inline void expect_same_dtype(ExtentChecks& checks, const char* buffer, xla::ffi::DataType got,
                              const char* other, xla::ffi::DataType expected) {
  if (got != expected) {
    checks.fail(std::string(buffer) + " must have the element type of " + other);
  }
}

// num_parts, from cuts [num_parts + 1, 2].
inline int64_t read_num_parts(ExtentChecks& checks, Dimensions cuts) {
  if (cuts[0] < 2 || cuts[1] != 2) {
    checks.fail("cuts must have shape [num_parts + 1, 2] with num_parts at least 1, got " +
                ExtentChecks::to_string(cuts));
  }
  return cuts[0] - 1;
}

inline void check_table_reach(ExtentChecks& checks, int64_t max_blocks, int64_t block_size) {
  if (checks.ok()) checks.int32("max_blocks * block_size (tokens)", max_blocks * block_size);
}

inline Status to_params(I32R1 cache_seqlens, Result<I32R2> cuts, MakeScheduleParams* params) {
  ExtentChecks checks;
  const auto [b] = checks.read<1>("cache_seqlens", cache_seqlens.dimensions(), {"b"});
  if (b > kMaxBatch) {
    checks.fail("b must be at most " + std::to_string(kMaxBatch) + ", got " + std::to_string(b));
  }
  params->b = checks.int32("b", b);
  params->num_parts = checks.int32("num_parts", read_num_parts(checks, cuts->dimensions()));
  params->cache_seqlens = cache_seqlens.typed_data();
  params->cuts = cuts->typed_data();
  return checks.status();
}

inline Status to_params(AnyBuffer q, AnyBuffer blocks, I32R2 block_table, I32R1 cache_seqlens,
                        I32R2 cuts, Result<AnyBuffer> out, Result<F32R3> lse,
                        Result<F32R4> out_accum, Result<F32R3> lse_accum,
                        const DenseDecodeAttrs& attrs, DenseDecodeParams* params) {
  ExtentChecks checks;
  const auto [b, s_q, h_q, d_qk] = checks.read<4>("q", q.dimensions(), {"b", "s_q", "h_q", "d_qk"});
  const auto [num_blocks, block_size, h_kv, row] =
      checks.read<4>("blocks", blocks.dimensions(), {"num_blocks", "block_size", "h_kv", "d_qk"});
  const auto [table_b, max_blocks] =
      checks.read<2>("block_table", block_table.dimensions(), {"b", "max_blocks"});
  const auto [out_b, out_s_q, out_h_q, d_v] =
      checks.read<4>("out", out->dimensions(), {"b", "s_q", "h_q", "d_v"});
  const int64_t num_parts = read_num_parts(checks, cuts.dimensions());
  if (!checks.ok()) return checks.status();

  if (h_q % h_kv != 0) {
    checks.fail("h_q must be a multiple of h_kv, got h_q=" + std::to_string(h_q) +
                " and h_kv=" + std::to_string(h_kv));
  }
  if (d_v > d_qk) {
    checks.fail("d_v must be at most d_qk, got d_v=" + std::to_string(d_v) +
                " and d_qk=" + std::to_string(d_qk));
  }
  checks.expect(
      "blocks", blocks.dimensions(),
      {{"num_blocks", num_blocks}, {"block_size", block_size}, {"h_kv", h_kv}, {"d_qk", d_qk}});
  checks.expect("block_table", block_table.dimensions(), {{"b", b}, {"max_blocks", max_blocks}});
  checks.expect("cache_seqlens", cache_seqlens.dimensions(), {{"b", b}});
  checks.expect("out", out->dimensions(), {{"b", b}, {"s_q", s_q}, {"h_q", h_q}, {"d_v", d_v}});
  checks.expect("lse", lse->dimensions(), {{"b", b}, {"s_q", s_q}, {"h_q", h_q}});
  checks.expect("out_accum", out_accum->dimensions(),
                {{"2 * num_parts", 2 * num_parts}, {"s_q", s_q}, {"h_q", h_q}, {"d_v", d_v}});
  checks.expect("lse_accum", lse_accum->dimensions(),
                {{"2 * num_parts", 2 * num_parts}, {"s_q", s_q}, {"h_q", h_q}});
  check_table_reach(checks, max_blocks, block_size);
  if (checks.ok()) checks.int32("b * s_q * h_q (query rows)", b * s_q * h_q);
  if (checks.ok()) {
    checks.int32("2 * num_parts * s_q * h_q (workspace rows)", 2 * num_parts * s_q * h_q);
  }

  params->b = checks.int32("b", b);
  params->s_q = checks.int32("s_q", s_q);
  params->h_q = checks.int32("h_q", h_q);
  params->h_kv = checks.int32("h_kv", h_kv);
  params->d_qk = checks.int32("d_qk", d_qk);
  params->d_v = checks.int32("d_v", d_v);
  params->num_blocks = num_blocks;
  params->block_size = checks.int32("block_size", block_size);
  params->max_blocks = checks.int32("max_blocks", max_blocks);
  params->num_parts = checks.int32("num_parts", num_parts);
  params->dtype = read_dtype(checks, "q", q.element_type());
  expect_same_dtype(checks, "blocks", blocks.element_type(), "q", q.element_type());
  expect_same_dtype(checks, "out", out->element_type(), "q", q.element_type());
  params->sm_scale = attrs.sm_scale;
  params->causal = attrs.causal;

  params->q = q.untyped_data();
  params->blocks = blocks.untyped_data();
  params->block_table = block_table.typed_data();
  params->cache_seqlens = cache_seqlens.typed_data();
  params->cuts = cuts.typed_data();
  params->out = out->untyped_data();
  params->lse = lse->typed_data();
  params->out_accum = out_accum->typed_data();
  params->lse_accum = lse_accum->typed_data();
  return checks.status();
}

inline Status to_params(AnyBuffer blocks, AnyBuffer rows, I32R2 block_table, I32R1 positions,
                        I32R1 num_new, Result<AnyBuffer> updated, CacheAppendParams* params) {
  ExtentChecks checks;
  const auto [num_blocks, block_size, h_kv, row] =
      checks.read<4>("blocks", blocks.dimensions(), {"num_blocks", "block_size", "h_kv", "row"});
  const auto [b, s_new, rows_h_kv, rows_row] =
      checks.read<4>("rows", rows.dimensions(), {"b", "s_new", "h_kv", "row"});
  const auto [table_b, max_blocks] =
      checks.read<2>("block_table", block_table.dimensions(), {"b", "max_blocks"});
  if (!checks.ok()) return checks.status();

  checks.expect("rows", rows.dimensions(),
                {{"b", b}, {"s_new", s_new}, {"h_kv", h_kv}, {"row", row}});
  checks.expect("block_table", block_table.dimensions(), {{"b", b}, {"max_blocks", max_blocks}});
  checks.expect("positions", positions.dimensions(), {{"b", b}});
  checks.expect("num_new", num_new.dimensions(), {{"b", b}});
  checks.expect(
      "the result", updated->dimensions(),
      {{"num_blocks", num_blocks}, {"block_size", block_size}, {"h_kv", h_kv}, {"row", row}});
  check_table_reach(checks, max_blocks, block_size);

  read_dtype(checks, "blocks", blocks.element_type());
  expect_same_dtype(checks, "rows", rows.element_type(), "blocks", blocks.element_type());
  expect_same_dtype(checks, "the result", updated->element_type(), "blocks", blocks.element_type());

  params->b = checks.int32("b", b);
  params->s_new = checks.int32("s_new", s_new);
  params->max_blocks = checks.int32("max_blocks", max_blocks);
  params->block_size = checks.int32("block_size", block_size);
  params->num_blocks = num_blocks;
  params->row_bytes = h_kv * row * static_cast<int64_t>(xla::ffi::ByteWidth(blocks.element_type()));

  params->blocks = blocks.untyped_data();
  params->rows = rows.untyped_data();
  params->block_table = block_table.typed_data();
  params->positions = positions.typed_data();
  params->num_new = num_new.typed_data();
  params->updated = updated->untyped_data();
  return checks.status();
}

}  // namespace flashmla::ffi
