// index_append: its attributes, operands and results, and their way into IndexAppendParams.
#pragma once

#include <string>
#include <utility>

#include "ffi/append.h"
#include "ffi/buffers.h"
#include "ffi/rope_layout.h"
#include "params/index_append.h"
#include "status.h"

namespace flashmla::ffi {

struct IndexAppendAttrs {
  int32_t block_size, layout;
  bool hadamard;
  float eps, weight_scale;
};

template <typename Binding>
auto bind_index_append(Binding context) {
  return std::move(context)
      .template Arg<AnyBuffer>()  // blocks
      .template Arg<AnyBuffer>()  // projected
      .template Arg<AnyBuffer>()  // k_norm
      .template Arg<AnyBuffer>()  // k_bias
      .template Arg<F32R3>()      // cos
      .template Arg<F32R3>()      // sin
      .template Arg<AnyBuffer>()  // q
      .template Arg<F32R3>()      // weights
      .template Arg<I32R2>()      // block_table
      .template Arg<I32R1>()      // positions
      .template Arg<I32R1>()      // num_new
      .template Ret<AnyBuffer>()  // blocks updated, as a rule aliased to operand 0
      .template Ret<AnyBuffer>()  // codes
      .template Ret<F32R3>()      // scaled
      .template Attrs<IndexAppendAttrs>();
}

inline Status read_index_append(AnyBuffer blocks, AnyBuffer projected, AnyBuffer k_norm,
                                AnyBuffer k_bias, F32R3 cos, F32R3 sin, AnyBuffer q, F32R3 weights,
                                I32R2 block_table, I32R1 positions, I32R1 num_new,
                                Result<AnyBuffer> updated, Result<AnyBuffer> codes,
                                Result<F32R3> scaled, const IndexAppendAttrs& attrs,
                                IndexAppendParams* params) {
  ExtentChecks checks;
  const auto [b, s_new, columns] =
      checks.read<3>("projected", projected.dimensions(), {"b", "s_new", "columns"});
  params->layout = read_layout(checks, attrs.layout);
  if (!checks.ok()) return checks.status();
  const int64_t heads = weights.dimensions()[2], pairs = cos.dimensions()[2];  // may be 0
  if (columns < kIndexColumns) {
    checks.fail("projected must have at least " + std::to_string(kIndexColumns) + " columns, got " +
                ExtentChecks::to_string(projected.dimensions()));
  }
  if (2 * pairs > kIndexColumns || (params->layout == RopeLayout::kNone && pairs > 0)) {
    checks.fail("cos must have at most " + std::to_string(kIndexColumns / 2) +
                " pairs, and none where nothing is rotated, got " +
                ExtentChecks::to_string(cos.dimensions()));
  }
  CacheAppendParams& cache = params->cache;
  read_append(checks, blocks, block_table, positions, num_new, nullptr, *updated,
              static_cast<int32_t>(Format::kFp8Index), attrs.block_size,
              {b, s_new, 1, kIndexColumns}, &cache);
  if (!checks.ok()) return checks.status();

  checks.expect("k_norm", k_norm.dimensions(), {{"columns", kIndexColumns}});
  checks.expect("k_bias", k_bias.dimensions(), {{"columns", kIndexColumns}});
  checks.expect("cos", cos.dimensions(), {{"b", b}, {"s_new", s_new}, {"pairs", pairs}});
  checks.expect("sin", sin.dimensions(), {{"b", b}, {"s_new", s_new}, {"pairs", pairs}});
  checks.expect("weights", weights.dimensions(), {{"b", b}, {"s_new", s_new}, {"heads", heads}});
  checks.expect("scaled", scaled->dimensions(), {{"b", b}, {"s_new", s_new}, {"heads", heads}});
  for (const auto& [name, rows] :
       {std::pair("q", q.dimensions()), {"codes", codes->dimensions()}}) {
    checks.expect(name, rows,
                  {{"b", b}, {"s_new", s_new}, {"heads", heads}, {"columns", kIndexColumns}});
  }
  cache.rows_dtype = read_dtype(checks, "projected", projected.element_type());
  expect_same_dtype(checks, "q", q.element_type(), "projected", projected.element_type());
  params->norm_dtype = read_dtype(checks, "k_norm", k_norm.element_type());
  expect_same_dtype(checks, "k_bias", k_bias.element_type(), "k_norm", k_norm.element_type());
  if (codes->element_type() != xla::ffi::F8E4M3FN) checks.fail("codes must be f8e4m3fn");
  if (checks.ok()) checks.int32("b * s_new * (heads + 1) (rows)", b * s_new * (heads + 1));

  params->columns = checks.int32("columns", columns);
  params->heads = checks.int32("heads", heads);
  params->pairs = checks.int32("pairs", pairs);
  params->hadamard = attrs.hadamard;
  params->eps = attrs.eps;
  params->weight_scale = attrs.weight_scale;
  params->projected = projected.untyped_data();
  params->k_norm = k_norm.untyped_data();
  params->k_bias = k_bias.untyped_data();
  params->cos = cos.typed_data();
  params->sin = sin.typed_data();
  params->q = q.untyped_data();
  params->weights = weights.typed_data();
  params->codes = static_cast<uint8_t*>(codes->untyped_data());
  params->scaled = scaled->typed_data();
  return checks.status();
}

}  // namespace flashmla::ffi

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(flashmla::ffi::IndexAppendAttrs,
                                      ::xla::ffi::StructMember<int32_t>("block_size"),
                                      ::xla::ffi::StructMember<int32_t>("layout"),
                                      ::xla::ffi::StructMember<bool>("hadamard"),
                                      ::xla::ffi::StructMember<float>("eps"),
                                      ::xla::ffi::StructMember<float>("weight_scale"));

FLASHMLA_OPERATION(index_append, IndexAppendParams)
