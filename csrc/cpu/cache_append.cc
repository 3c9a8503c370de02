#include "cpu/cache_append.h"

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace flashmla::cpu {
namespace {

constexpr int64_t kBytesPerTask = 256 * 1024;  // less is not worth handing to another thread

// Where rows[i, j] goes, as a row index into blocks; -1 if it is to be dropped.
int64_t destination(const CacheAppendParams& params, int64_t i, int64_t j) {
  if (j >= params.num_new[i]) return -1;
  const int64_t position = params.positions[i] + j;
  if (position < 0 || position >= int64_t{params.max_blocks} * params.block_size) return -1;
  const int64_t block = params.block_table[i * params.max_blocks + position / params.block_size];
  if (block < 0 || block >= params.num_blocks) return -1;
  return block * params.block_size + position % params.block_size;
}

}  // namespace

Status run_cache_append(const CacheAppendParams& params, const ParallelFor& parallel_for) {
  const int64_t num_rows = int64_t{params.b} * params.s_new;
  const int64_t itemsize = params.rows_dtype == DType::kFloat32 ? 4 : 2;
  const int64_t head_bytes = params.d * itemsize, stride_bytes = params.row_stride * itemsize;
  const int64_t row_bytes = params.h_kv * head_bytes;
  const int64_t rows_per_task = kBytesPerTask / std::min(row_bytes, kBytesPerTask);
  const auto* rows = static_cast<const char*>(params.rows);
  auto* updated = static_cast<char*>(params.updated);
  if (params.updated != params.blocks) {
    std::memcpy(updated, params.blocks, params.num_blocks * params.block_bytes);
  }

  const auto num_tasks = static_cast<int>((num_rows + rows_per_task - 1) / rows_per_task);
  parallel_for(num_tasks, [&](int task) {
    const int64_t begin = task * rows_per_task;
    const int64_t end = std::min(begin + rows_per_task, num_rows);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t slot = destination(params, row / params.s_new, row % params.s_new);
      if (slot < 0) continue;
      for (int head = 0; head < params.h_kv; ++head) {
        std::memcpy(updated + (slot * params.h_kv + head) * stride_bytes,
                    rows + row * row_bytes + head * head_bytes, head_bytes);
      }
    }
  });
  return Status::Ok();
}

}  // namespace flashmla::cpu
