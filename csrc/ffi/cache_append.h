// cache_append: its attributes, operands and results, and their way into CacheAppendParams.
#pragma once

#include <utility>

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
  const auto [b, s_new, h_kv, d] =
      checks.read<4>("rows", rows.dimensions(), {"b", "s_new", "h_kv", "d_qk"});
  const BlocksExtents cache =
      read_blocks(checks, blocks, attrs.format, attrs.block_size, "blocks", h_kv);
  const auto [table_b, max_blocks] =
      checks.read<2>("block_table", block_table.dimensions(), {"b", "max_blocks"});
  if (!checks.ok()) return checks.status();

  const bool dense = cache.format == Format::kDense;
  if (dense) {
    expect_same_dtype(checks, "rows", rows.element_type(), "blocks", blocks.element_type());
  }
  if (h_kv != cache.h_kv || (dense ? d > cache.row_stride : d != cache.row_stride)) {
    checks.fail("rows must end in blocks' [h_kv=" + std::to_string(cache.h_kv) +
                (dense ? ", at most " : ", ") + std::to_string(cache.row_stride) + "], got " +
                ExtentChecks::to_string(rows.dimensions()));
  }
  checks.expect("block_table", block_table.dimensions(), {{"b", b}, {"max_blocks", max_blocks}});
  checks.expect("positions", positions.dimensions(), {{"b", b}});
  checks.expect("num_new", num_new.dimensions(), {{"b", b}});
  const auto same = [](Dimensions x, Dimensions y) {
    return std::equal(x.begin(), x.end(), y.begin(), y.end());
  };
  if (!same(updated->dimensions(), blocks.dimensions())) {
    checks.fail("the result must have blocks' shape " +
                ExtentChecks::to_string(blocks.dimensions()) + ", got " +
                ExtentChecks::to_string(updated->dimensions()));
  }
  expect_same_dtype(checks, "the result", updated->element_type(), "blocks", blocks.element_type());
  check_table_reach(checks, max_blocks, cache.block_size);

  params->b = checks.int32("b", b);
  params->s_new = checks.int32("s_new", s_new);
  params->max_blocks = checks.int32("max_blocks", max_blocks);
  params->block_size = attrs.block_size;
  params->num_blocks = cache.num_blocks;
  params->block_bytes = cache.block_bytes;
  params->format = cache.format;
  params->rows_dtype = read_dtype(checks, "rows", rows.element_type());
  params->h_kv = checks.int32("h_kv", h_kv);
  params->d = checks.int32("d_qk", d);
  params->row_stride = cache.row_stride;

  params->blocks = blocks.untyped_data();
  params->rows = rows.untyped_data();
  params->block_table = block_table.typed_data();
  params->positions = positions.typed_data();
  params->num_new = num_new.typed_data();
  params->kv_scale = kv_scale.typed_data();
  params->updated = updated->untyped_data();
  return checks.status();
}

}  // namespace flashmla::ffi

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(flashmla::ffi::CacheAppendAttrs,
                                      ::xla::ffi::StructMember<int32_t>("format"),
                                      ::xla::ffi::StructMember<int32_t>("block_size"));

FLASHMLA_OPERATION(cache_append, CacheAppendParams)
