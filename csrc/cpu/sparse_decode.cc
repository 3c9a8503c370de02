#include "cpu/sparse_decode.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "cpu/attend/attend.h"
#include "cpu/attend/base2.h"
#include "cpu/attend/rows.h"
#include "elements.h"

namespace flashmla::cpu {
namespace {

constexpr int kLeastRows = 32;  // fewer query rows do not pay for the conversion of the keys
constexpr int kFewTasks = 16;

// Heads of a task: as many as share a conversion of the keys, but fewer where that would leave
// threads without a task. It depends on the extents alone, and so do the result's bits.
int choose_heads(const SparseDecodeParams& params) {
  int heads = kMaxRows;
  const auto tasks = [&] {
    return int64_t{params.b} * params.s_q * ((params.h_q + heads - 1) / heads);
  };
  while (heads > kLeastRows && tasks() < kFewTasks) heads /= 2;
  return heads;
}

CacheRows cache_rows(const SparseDecodeParams& params, const SparseSource& source) {
  if (source.format == Format::kDense) {
    return CacheRows::dense(source.blocks, source.num_blocks, source.block_bytes, params.dtype,
                            params.d_qk, /*h_kv=*/1, /*kv_head=*/0, source.row_stride);
  }
  return CacheRows::coded(source.blocks, source.num_blocks, source.block_bytes, source.block_size,
                          source.format, params.dtype);
}

// The rows that a query token attends in a cache.
void find_rows(const SparseSource& source, const CacheRows& cache, int64_t query,
               std::vector<Row>& found) {
  const int64_t slots = source.layer_blocks * source.block_size;
  const int64_t last_first = std::max<int64_t>(source.num_blocks - source.layer_blocks, 0);
  const int64_t first =
      source.first_block ? std::clamp<int64_t>(*source.first_block, 0, last_first) : 0;
  const int length =
      source.topk_length ? std::clamp(source.topk_length[query], 0, source.topk) : source.topk;
  const int32_t* indices = source.indices + query * source.topk;
  found.clear();
  for (int i = 0; i < length; ++i) {
    const int32_t slot = indices[i];
    if (slot < 0 || slot >= slots) continue;
    found.push_back(cache.row(first + slot / source.block_size, slot % source.block_size));
  }
}

void attend_rows(const RowFormat& format, const std::vector<Row>& rows, AttendState& state) {
  Tile tile;
  const auto size = static_cast<int64_t>(rows.size());
  for (int64_t begin = 0; begin < size; begin += kSplitTile) {
    tile.n = static_cast<int>(std::min<int64_t>(kSplitTile, size - begin));
    tile.num_known = static_cast<int>(std::min<int64_t>(kSplitTile + kPrefetchRows, size - begin));
    std::copy_n(rows.begin() + begin, tile.num_known, tile.rows);
    std::fill_n(tile.visible, state.num_rows, tile.n);
    attend_tile(format, tile, state);
  }
}

// The factor of values that attend_tile leaves as codes: 1 but for kFp8Row.
float value_scale(const SparseDecodeParams& params) {
  return params.main.format == Format::kFp8Row ? *params.kv_scale : 1.0f;
}

// What the sink adds to a head's sum of weights 2^(score - row_max).
float sink_weight(const SparseDecodeParams& params, int head, float row_max) {
  return params.attn_sink ? std::exp2(params.attn_sink[head] * kLog2E - row_max) : 0.0f;
}

void store_heads(const SparseDecodeParams& params, int64_t query, int first_head,
                 const AttendState& state, float* max_logits) {
  for (int row = 0; row < state.num_rows; ++row) {
    const int head = first_head + row;
    const int64_t index = query * params.h_q + head;
    const float sum = state.row_sum[row], row_max = state.row_max[row];
    const float* acc = state.acc + row * state.acc_stride;
    float scale = 0.0f;
    if (sum != 0.0f) scale = value_scale(params) / (sum + sink_weight(params, head, row_max));
    with_element(params.dtype, [&](auto element) {
      using Element = decltype(element);
      Element* out = static_cast<Element*>(params.out) + index * params.d_v;
      for (int c = 0; c < params.d_v; ++c) out[c] = Element::from_float(acc[c] * scale);
    });
    params.lse[index] = (row_max + std::log2(sum)) * kLn2;  // -inf where the sum is 0
    if (max_logits) max_logits[index] = row_max * kLn2;
  }
}

}  // namespace

Status attend_sparsely(const SparseDecodeParams& params, float* max_logits,
                       const ParallelFor& parallel_for) {
  const int heads = choose_heads(params);
  const int groups = (params.h_q + heads - 1) / heads;
  const float scale = params.sm_scale * kLog2E * value_scale(params);
  const int num_queries = params.b * params.s_q;
  parallel_for(num_queries * groups, [&](int task) {
    static thread_local AttendState state;
    static thread_local std::vector<Row> rows;
    const int64_t query = task / groups;
    const int first_head = task % groups * heads;
    state.begin(std::min(heads, params.h_q - first_head), params.d_qk, params.d_v);
    const int64_t row_bytes = int64_t{params.d_qk} * itemsize(params.dtype);
    const auto* q =
        static_cast<const char*>(params.q) + (query * params.h_q + first_head) * row_bytes;
    for (int row = 0; row < state.num_rows; ++row) {
      state.load_query(row, q + row * row_bytes, params.dtype, scale);
    }
    for (const SparseSource* source : {&params.main, &params.extra}) {
      if (source->blocks == nullptr) continue;
      const CacheRows cache = cache_rows(params, *source);
      find_rows(*source, cache, query, rows);
      attend_rows(cache.format, rows, state);
    }
    store_heads(params, query, first_head, state, max_logits);
  });
  return Status::Ok();
}

Status run_sparse_decode(const SparseDecodeParams& params, const ParallelFor& parallel_for) {
  return attend_sparsely(params, /*max_logits=*/nullptr, parallel_for);
}

}  // namespace flashmla::cpu
