#include "cpu/project.h"

#include <algorithm>
#include <cstdint>

#include <cstring>
#include <vector>

#include "elements.h"

namespace flashmla::cpu {

constexpr int kColumns = 64;  // of y that a task makes
constexpr int kRows = 128;    // that share one conversion of the weights to float
constexpr int kDepth = 64;    // weights of a column that are converted at a time

}  // namespace flashmla::cpu

#define FLASHMLA_SIMD_SOURCE "cpu/project_simd.h"
#include "cpu/each_isa.h"
#undef FLASHMLA_SIMD_SOURCE

namespace flashmla::cpu {
namespace {

// sums [rows, kColumns] += x [rows, kDepth] times w [kDepth, kColumns], of which depth count.
void multiply(const float* w, const float* x, int rows, int depth, float* sums) {
  FLASHMLA_RUN_BEST_ISA(multiply_tile(w, x, rows, depth, sums));
}

// So many columns of one of the weights, from its column `begin` on.
struct Columns {
  int weight, begin, count;
};

// The task-th columns of y; none where they are those to be rotated.
Columns find_columns(const ProjectParams& params, int task) {
  for (int weight = 0; weight < kMaxWeights; ++weight) {
    const int n = params.n_of[weight], tasks = (n + kColumns - 1) / kColumns;
    const int begin = task * kColumns;
    if (task < tasks) return {weight, begin, std::min(kColumns, n - begin)};
    task -= tasks;
  }
  return {0, 0, 0};
}

// These columns of y of one group.
template <class Element>
void make_columns(const ProjectParams& params, int group, const Columns& columns) {
  const int begin = columns.begin, count = columns.count, n = params.n_of[columns.weight];
  const auto* w =
      static_cast<const Element*>(params.w[columns.weight]) + int64_t{group} * params.k * n;
  const auto [to_y, y_row] = params.out[columns.weight];
  const int64_t x_row = params.k + params.rope;
  const auto* x = static_cast<const Element*>(params.x) + group * x_row;
  auto* y = static_cast<Element*>(to_y) + group * y_row + begin;
  std::vector<float> wide(kDepth * kColumns), rows_wide(kRows * kDepth), sums;
  for (int row = 0; row < params.rows; row += kRows) {
    const int rows = std::min(kRows, params.rows - row);
    sums.assign(rows * kColumns, 0.0f);
    for (int l0 = 0; l0 < params.k; l0 += kDepth) {
      const int depth = std::min(kDepth, params.k - l0);
      if (params.transposed) {
        for (int j = 0; j < count; ++j) {
          const Element* from = w + int64_t{begin + j} * params.k + l0;
          for (int l = 0; l < depth; ++l) wide[l * kColumns + j] = Element::to_float(from[l]);
        }
      } else {
        for (int l = 0; l < depth; ++l) {
          const Element* from = w + int64_t{l0 + l} * n + begin;
          for (int j = 0; j < count; ++j) wide[l * kColumns + j] = Element::to_float(from[j]);
        }
      }
      for (int i = 0; i < rows; ++i) {
        const Element* from = x + (row + i) * params.groups * x_row + l0;
        for (int l = 0; l < depth; ++l) rows_wide[i * kDepth + l] = Element::to_float(from[l]);
      }
      multiply(wide.data(), rows_wide.data(), rows, depth, sums.data());
    }
    for (int i = 0; i < rows; ++i) {
      Element* to = y + (row + i) * params.groups * y_row;
      for (int j = 0; j < count; ++j) to[j] = Element::from_float(sums[i * kColumns + j]);
    }
  }
}

// The products of one group with the float32 weight.
template <class Element>
void make_exact(const ProjectParams& params, int group) {
  const int n = params.exact_n;
  const float* w = params.exact_w + int64_t{group} * params.k * n;
  for (int64_t row = 0; row < params.rows; ++row) {
    const int64_t at = row * params.groups + group;
    const auto* x = static_cast<const Element*>(params.x) + at * (params.k + params.rope);
    float* y = params.exact_y + at * n;
    std::fill(y, y + n, 0.0f);
    for (int64_t l = 0; l < params.k; ++l) {
      const float v = Element::to_float(x[l]);
      for (int j = 0; j < n; ++j) y[j] += v * w[l * n + j];
    }
  }
}

// The columns of x past k, rotated, of one group.
template <class Element>
void turn_columns(const ProjectParams& params, int group) {
  const int pairs = params.rope / 2;
  for (int64_t row = 0; row < params.rows; ++row) {
    const int64_t at = row * params.groups + group;
    const auto* from =
        static_cast<const Element*>(params.x) + at * (params.k + params.rope) + params.k;
    auto* to = static_cast<Element*>(params.y) + at * (params.n + params.rope) + params.n;
    if (params.layout == RopeLayout::kNone) {
      std::copy(from, from + params.rope, to);
      continue;
    }
    for (int pair = 0; pair < pairs; ++pair) {
      const RopePair columns = rope_pair(params.layout, pair, pairs);
      const float cos = params.cos[row * pairs + pair], sin = params.sin[row * pairs + pair];
      const float a = Element::to_float(from[columns.from[0]]);
      const float b = Element::to_float(from[columns.from[1]]);
      to[columns.to[0]] = Element::from_float(a * cos - b * sin);
      to[columns.to[1]] = Element::from_float(b * cos + a * sin);
    }
  }
}

}  // namespace

Status run_project(const ProjectParams& params, const ParallelFor& parallel_for) {
  int tiles = params.rope > 0 || params.exact_n > 0 ? 1 : 0;
  for (const int n : params.n_of) tiles += (n + kColumns - 1) / kColumns;
  parallel_for(params.groups * tiles, [&](int task) {
    const int group = task / tiles;
    const Columns columns = find_columns(params, task % tiles);
    with_element(params.dtype, [&](auto element) {
      using Element = decltype(element);
      if (columns.count > 0) return make_columns<Element>(params, group, columns);
      turn_columns<Element>(params, group);
      make_exact<Element>(params, group);
    });
  });
  return Status::Ok();
}

}  // namespace flashmla::cpu
