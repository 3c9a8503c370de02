#include "cpu/cache_append.h"

#include <algorithm>
#include <cstdint>

#include "cpu/store_row.h"

namespace flashmla::cpu {
namespace {

constexpr int64_t kBytesPerTask = 256 * 1024;  // less is not worth handing to another thread

}  // namespace

Status run_cache_append(const CacheAppendParams& params, const ParallelFor& parallel_for) {
  const int64_t num_rows = int64_t{params.b} * params.s_new;
  const int64_t row_bytes = int64_t{params.h_kv} * params.d * itemsize(params.rows_dtype);
  const int64_t rows_per_task = kBytesPerTask / std::min(row_bytes, kBytesPerTask);
  const auto* rows = static_cast<const char*>(params.rows);
  begin_append(params);

  const auto num_tasks = static_cast<int>((num_rows + rows_per_task - 1) / rows_per_task);
  parallel_for(num_tasks, [&](int task) {
    const int64_t begin = task * rows_per_task;
    const int64_t end = std::min(begin + rows_per_task, num_rows);
    for (int64_t row = begin; row < end; ++row) {
      const AppendSlot slot = find_slot(params, row / params.s_new, row % params.s_new);
      if (slot.block >= 0) store_row(params, rows + row * row_bytes, slot);
    }
  });
  return Status::Ok();
}

}  // namespace flashmla::cpu
