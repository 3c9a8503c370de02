// What operations that append rows read off the cache that they append to.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <string>

#include "ffi/buffers.h"
#include "params/cache_append.h"

namespace flashmla::ffi {

// The cache that rows [b, s_new, h_kv, d] are appended to; all of params but the rows themselves.
inline void read_append(ExtentChecks& checks, AnyBuffer blocks, I32R2 block_table, I32R1 positions,
                        I32R1 num_new, const float* kv_scale, AnyBuffer updated, int32_t format,
                        int32_t block_size, const std::array<int64_t, 4>& rows,
                        CacheAppendParams* params) {
  const auto [b, s_new, h_kv, d] = rows;
  const BlocksExtents cache = read_blocks(checks, blocks, format, block_size, "blocks", h_kv);
  const auto [table_b, max_blocks] =
      checks.read<2>("block_table", block_table.dimensions(), {"b", "max_blocks"});
  if (!checks.ok()) return;

  const bool dense = cache.format == Format::kDense;
  if (h_kv != cache.h_kv || (dense ? d > cache.row_stride : d != cache.row_stride)) {
    checks.fail("rows must end in blocks' [h_kv=" + std::to_string(cache.h_kv) +
                (dense ? ", at most " : ", ") + std::to_string(cache.row_stride) + "], got " +
                ExtentChecks::to_string(Dimensions(rows.data(), rows.size())));
  }
  checks.expect("block_table", block_table.dimensions(), {{"b", b}, {"max_blocks", max_blocks}});
  checks.expect("positions", positions.dimensions(), {{"b", b}});
  checks.expect("num_new", num_new.dimensions(), {{"b", b}});
  const auto same = [](Dimensions x, Dimensions y) {
    return std::equal(x.begin(), x.end(), y.begin(), y.end());
  };
  if (!same(updated.dimensions(), blocks.dimensions())) {
    checks.fail("the result must have blocks' shape " +
                ExtentChecks::to_string(blocks.dimensions()) + ", got " +
                ExtentChecks::to_string(updated.dimensions()));
  }
  expect_same_dtype(checks, "the result", updated.element_type(), "blocks", blocks.element_type());
  check_table_reach(checks, max_blocks, cache.block_size);

  params->b = checks.int32("b", b);
  params->s_new = checks.int32("s_new", s_new);
  params->max_blocks = checks.int32("max_blocks", max_blocks);
  params->block_size = block_size;
  params->num_blocks = cache.num_blocks;
  params->block_bytes = cache.block_bytes;
  params->format = cache.format;
  params->h_kv = checks.int32("h_kv", h_kv);
  params->d = checks.int32("d_qk", d);
  params->row_stride = cache.row_stride;

  params->blocks = blocks.untyped_data();
  params->rows = nullptr;
  params->block_table = block_table.typed_data();
  params->positions = positions.typed_data();
  params->num_new = num_new.typed_data();
  params->kv_scale = kv_scale;
  params->updated = updated.untyped_data();
}

}  // namespace flashmla::ffi
