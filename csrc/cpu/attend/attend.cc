#include "cpu/attend/attend.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "elements.h"
#include "formats.h"
#include "quantise.h"

#define FLASHMLA_SIMD_SOURCE "cpu/attend/attend_simd.h"
#include "cpu/each_isa.h"

namespace flashmla::cpu {
namespace {

constexpr int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

}  // namespace

void AttendState::resize(int d_qk, int d_v) {
  const int stride = round_up(d_qk, kAlignment) + kAlignment;  // one more: no power of two
  if (stride == key_stride && round_up(d_v, kAlignment) == acc_stride) return;
  key_stride = stride;
  acc_stride = round_up(d_v, kAlignment);
  const size_t size = size_t{kMaxRows} * (key_stride + kSplitTile + 3 + acc_stride) +
                      size_t{kSplitTile} * key_stride;
  storage_.assign(size + kAlignment, 0.0f);

  constexpr uintptr_t kBytes = kAlignment * sizeof(float);
  const auto start = reinterpret_cast<uintptr_t>(storage_.data());
  float* next = storage_.data() + ((kBytes - start % kBytes) % kBytes) / sizeof(float);
  const auto take = [&next](size_t n) { return std::exchange(next, next + n); };
  query = take(size_t{kMaxRows} * key_stride);
  tile = take(size_t{kSplitTile} * key_stride);
  weights = take(size_t{kMaxRows} * kSplitTile);
  decay = take(kMaxRows);
  row_max = take(kMaxRows);
  row_sum = take(kMaxRows);
  acc = take(size_t{kMaxRows} * acc_stride);
}

void AttendState::begin(int rows, int row_d_qk, int d_v) {
  resize(row_d_qk, d_v);
  num_rows = rows;
  d_qk = row_d_qk;
  for (int t = 0; t < kSplitTile; ++t) {
    std::fill(tile + t * key_stride + d_qk, tile + (t + 1) * key_stride, 0.0f);
  }
  std::fill_n(row_max, num_rows, -std::numeric_limits<float>::infinity());
  std::fill_n(row_sum, num_rows, 0.0f);
  std::fill_n(acc, int64_t{num_rows} * acc_stride, 0.0f);
}

void AttendState::load_query(int row, const void* q, DType dtype, float scale) {
  float* to = query + row * key_stride;
  with_element(dtype, [&](auto element) {
    using Element = decltype(element);
    const auto* from = static_cast<const Element*>(q);
    for (int k = 0; k < d_qk; ++k) to[k] = Element::to_float(from[k]) * scale;
  });
  std::fill(to + d_qk, to + key_stride, 0.0f);
}

void attend_tile(const RowFormat& format, const Tile& tile, AttendState& state) {
  FLASHMLA_RUN_BEST_ISA(attend_tile(format, tile, state));
}

}  // namespace flashmla::cpu
