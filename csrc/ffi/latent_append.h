// latent_append: its attributes, operands and results, and their way into LatentAppendParams.
#pragma once

#include <array>
#include <string>
#include <utility>

#include "ffi/append.h"
#include "ffi/buffers.h"
#include "ffi/rope_layout.h"
#include "params/latent_append.h"
#include "status.h"

namespace flashmla::ffi {

struct LatentAppendAttrs {
  int32_t format, block_size, rows_dtype, layout;
  float q_eps, kv_eps, latent_scale;
};

template <typename Binding>
auto bind_latent_append(Binding context) {
  return std::move(context)
      .template Arg<AnyBuffer>()  // blocks
      .template Arg<AnyBuffer>()  // projected
      .template Arg<AnyBuffer>()  // q_norm
      .template Arg<AnyBuffer>()  // kv_norm
      .template Arg<F32R3>()      // cos
      .template Arg<F32R3>()      // sin
      .template Arg<I32R2>()      // block_table
      .template Arg<I32R1>()      // positions
      .template Arg<I32R1>()      // num_new
      .template Arg<F32R0>()      // kv_scale
      .template Ret<AnyBuffer>()  // blocks updated, as a rule aliased to operand 0
      .template Ret<AnyBuffer>()  // q_latent
      .template Attrs<LatentAppendAttrs>();
}

// Columns of a row of the format; of a dense one what projected leaves, which blocks limit.
inline int64_t row_columns(const LatentAppendAttrs& attrs, int64_t left) {
  const bool dense = attrs.format <= 0 || attrs.format >= kNumFormats;
  return dense ? left : layout_of(static_cast<Format>(attrs.format)).d_qk;
}

inline Status read_latent_append(AnyBuffer blocks, AnyBuffer projected, AnyBuffer q_norm,
                                 AnyBuffer kv_norm, F32R3 cos, F32R3 sin, I32R2 block_table,
                                 I32R1 positions, I32R1 num_new, F32R0 kv_scale,
                                 Result<AnyBuffer> updated, Result<AnyBuffer> q_latent,
                                 const LatentAppendAttrs& attrs, LatentAppendParams* params) {
  ExtentChecks checks;
  const auto [b, s_new, columns] =
      checks.read<3>("projected", projected.dimensions(), {"b", "s_new", "columns"});
  const int64_t kv_rank = checks.read<1>("kv_norm", kv_norm.dimensions(), {"kv_rank"})[0];
  if (cos.dimensions().size() != 3 || q_norm.dimensions().size() != 1 || !checks.ok()) {
    checks.fail("q_norm must have shape [q_rank], got " +
                ExtentChecks::to_string(q_norm.dimensions()));
    return checks.status();
  }
  const int64_t q_rank = q_norm.dimensions()[0];
  params->layout = read_layout(checks, attrs.layout);
  if (attrs.rows_dtype < 0 || attrs.rows_dtype > static_cast<int32_t>(DType::kFloat32)) {
    checks.fail("rows_dtype must be between 0 and 2, got " + std::to_string(attrs.rows_dtype));
  }
  if (!checks.ok()) return checks.status();
  const bool turned = params->layout != RopeLayout::kNone;
  const int64_t pairs = cos.dimensions()[2];
  const int64_t d = turned ? kv_rank + 2 * pairs : row_columns(attrs, columns - q_rank);
  const int64_t rope = d - kv_rank;
  if (rope < 0 || q_rank + d > columns) {
    checks.fail("projected must have at least q_rank + d_qk = " + std::to_string(q_rank) + " + " +
                std::to_string(d) + " columns, got " +
                ExtentChecks::to_string(projected.dimensions()));
    return checks.status();
  }
  CacheAppendParams& cache = params->cache;
  read_append(checks, blocks, block_table, positions, num_new, kv_scale.typed_data(), *updated,
              attrs.format, attrs.block_size, {b, s_new, 1, d}, &cache);
  if (!checks.ok()) return checks.status();

  checks.expect("cos", cos.dimensions(), {{"b", b}, {"s_new", s_new}, {"rope / 2", pairs}});
  checks.expect("sin", sin.dimensions(), {{"b", b}, {"s_new", s_new}, {"rope / 2", pairs}});
  checks.expect("q_latent", q_latent->dimensions(),
                {{"b", b}, {"s_new", s_new}, {"q_rank", q_rank}});
  params->dtype = read_dtype(checks, "projected", projected.element_type());
  params->norm_dtype = read_dtype(checks, "kv_norm", kv_norm.element_type());
  expect_same_dtype(checks, "q_norm", q_norm.element_type(), "kv_norm", kv_norm.element_type());
  expect_same_dtype(checks, "q_latent", q_latent->element_type(), "projected",
                    projected.element_type());
  cache.rows_dtype = static_cast<DType>(attrs.rows_dtype);
  if (cache.format == Format::kDense &&
      read_dtype(checks, "blocks", blocks.element_type()) != cache.rows_dtype) {
    checks.fail("rows_dtype must be that of blocks, got " + std::to_string(attrs.rows_dtype));
  }

  if (checks.ok()) checks.int32("b * s_new (rows)", b * s_new);
  params->columns = checks.int32("columns", columns);
  params->q_rank = checks.int32("q_rank", q_rank);
  params->kv_rank = checks.int32("kv_rank", kv_rank);
  params->rope = checks.int32("rope", rope);
  params->q_eps = attrs.q_eps;
  params->kv_eps = attrs.kv_eps;
  params->latent_scale = attrs.latent_scale;
  params->projected = projected.untyped_data();
  params->q_norm = q_norm.untyped_data();
  params->kv_norm = kv_norm.untyped_data();
  params->cos = cos.typed_data();
  params->sin = sin.typed_data();
  params->q_latent = q_latent->untyped_data();
  return checks.status();
}

}  // namespace flashmla::ffi

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(flashmla::ffi::LatentAppendAttrs,
                                      ::xla::ffi::StructMember<int32_t>("format"),
                                      ::xla::ffi::StructMember<int32_t>("block_size"),
                                      ::xla::ffi::StructMember<int32_t>("rows_dtype"),
                                      ::xla::ffi::StructMember<int32_t>("layout"),
                                      ::xla::ffi::StructMember<float>("q_eps"),
                                      ::xla::ffi::StructMember<float>("kv_eps"),
                                      ::xla::ffi::StructMember<float>("latent_scale"));

FLASHMLA_OPERATION(latent_append, LatentAppendParams)
