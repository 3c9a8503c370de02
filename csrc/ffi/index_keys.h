// What the indexer's operations read alike: queries, keys and the table that they are found by.
#pragma once

#include <string>

#include "ffi/buffers.h"
#include "params/index_scores.h"

namespace flashmla::ffi {

// Scores [b, s_q, max_blocks * 64], given or made.
template <typename Dimensions>
void expect_index_scores(ExtentChecks& checks, const Dimensions& dimensions, int64_t b, int64_t s_q,
                         const IndexKeys& keys) {
  checks.expect("scores", dimensions,
                {{"b", b},
                 {"s_q", s_q},
                 {"max_blocks * block_size", int64_t{keys.max_blocks} * kIndexBlockSize}});
}

struct IndexQueryExtents {
  int64_t b = 0, s_q = 0, heads = 0;
  bool fp8 = false;
};

// q [b, s_q, heads, 128] e4m3 or bf16, and weights [b, s_q, heads].
inline IndexQueryExtents read_index_queries(ExtentChecks& checks, const AnyBuffer& q,
                                            const F32R3& weights) {
  const auto [b, s_q, heads, columns] =
      checks.read<4>("q", q.dimensions(), {"b", "s_q", "heads", "columns"});
  checks.expect("q", q.dimensions(),
                {{"b", b}, {"s_q", s_q}, {"heads", heads}, {"columns", kIndexColumns}});
  if (heads > kMaxIndexHeads) {
    checks.fail("heads must be at most " + std::to_string(kMaxIndexHeads) + ", got " +
                std::to_string(heads));
  }
  const bool fp8 = q.element_type() == xla::ffi::F8E4M3FN;
  if (!fp8 && q.element_type() != xla::ffi::BF16) {
    checks.fail("q must be f8e4m3fn or bf16, got XLA element type " +
                std::to_string(static_cast<int>(q.element_type())));
  }
  checks.expect("weights", weights.dimensions(), {{"b", b}, {"s_q", s_q}, {"heads", heads}});
  if (checks.ok()) checks.int32("b * s_q * heads (query rows)", b * s_q * heads);
  return {b, s_q, heads, fp8};
}

inline void read_index_table(ExtentChecks& checks, const I32R2& block_table,
                             const I32R1& cache_seqlens, int64_t b, IndexKeys& keys) {
  const int64_t max_blocks =
      checks.read<2>("block_table", block_table.dimensions(), {"b", "max_blocks"})[1];
  checks.expect("block_table", block_table.dimensions(), {{"b", b}, {"max_blocks", max_blocks}});
  checks.expect("cache_seqlens", cache_seqlens.dimensions(), {{"b", b}});
  check_table_reach(checks, max_blocks, kIndexBlockSize);
  keys.max_blocks = checks.int32("max_blocks", max_blocks);
  keys.block_table = block_table.typed_data();
  keys.cache_seqlens = cache_seqlens.typed_data();
}

// Slots of the layer fit in 32 bits.
inline void check_layer_slots(ExtentChecks& checks, int64_t layer_blocks) {
  if (layer_blocks < 1) {
    checks.fail("layer_blocks must be at least 1, got " + std::to_string(layer_blocks));
  }
  if (checks.ok()) {
    checks.int32("layer_blocks * block_size (slots)", layer_blocks * kIndexBlockSize);
  }
}

inline void read_index_blocks(ExtentChecks& checks, const AnyBuffer& blocks,
                              const I32R0& first_block, int64_t layer_blocks, IndexKeys& keys) {
  const BlocksExtents cache =
      read_blocks(checks, blocks, static_cast<int32_t>(Format::kFp8Index), kIndexBlockSize);
  if (layer_blocks > cache.num_blocks) {
    checks.fail("blocks must have at least layer_blocks=" + std::to_string(layer_blocks) +
                " blocks, got " + std::to_string(cache.num_blocks));
  }
  keys.num_blocks = cache.num_blocks;
  keys.block_bytes = cache.block_bytes;
  keys.first_block = first_block.typed_data();
  keys.blocks = blocks.untyped_data();
}

}  // namespace flashmla::ffi
