// cache_append: its attributes, operands and results, and their way into CacheAppendParams.
#pragma once

#include <utility>

#include "ffi/append.h"
#include "ffi/buffers.h"
#include "params/cache_append.h"
#include "status.h"

namespace flashmla::ffi {

struct CacheAppendAttrs {
  int32_t format, block_size;
};

template <typename Binding>
auto bind_cache_append(Binding context) {
  return std::move(context)
      .template Arg<AnyBuffer>()  // blocks
      .template Arg<AnyBuffer>()  // rows
      .template Arg<I32R2>()      // block_table
      .template Arg<I32R1>()      // positions
      .template Arg<I32R1>()      // num_new
      .template Arg<F32R0>()      // kv_scale
      .template Ret<AnyBuffer>()  // blocks updated, as a rule aliased to operand 0
      .template Attrs<CacheAppendAttrs>();
}

inline Status read_cache_append(AnyBuffer blocks, AnyBuffer rows, I32R2 block_table,
                                I32R1 positions, I32R1 num_new, F32R0 kv_scale,
                                Result<AnyBuffer> updated, const CacheAppendAttrs& attrs,
                                CacheAppendParams* params) {
  ExtentChecks checks;
  const auto extents = checks.read<4>("rows", rows.dimensions(), {"b", "s_new", "h_kv", "d_qk"});
  if (!checks.ok()) return checks.status();
  read_append(checks, blocks, block_table, positions, num_new, kv_scale.typed_data(), *updated,
              attrs.format, attrs.block_size, extents, params);
  if (!checks.ok()) return checks.status();
  if (params->format == Format::kDense) {
    expect_same_dtype(checks, "rows", rows.element_type(), "blocks", blocks.element_type());
  }
  params->rows_dtype = read_dtype(checks, "rows", rows.element_type());
  params->rows = rows.untyped_data();
  return checks.status();
}

}  // namespace flashmla::ffi

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(flashmla::ffi::CacheAppendAttrs,
                                      ::xla::ffi::StructMember<int32_t>("format"),
                                      ::xla::ffi::StructMember<int32_t>("block_size"));

FLASHMLA_OPERATION(cache_append, CacheAppendParams)
