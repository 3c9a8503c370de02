#include "cpu/merge.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "cpu/attend/base2.h"
#include "elements.h"

namespace flashmla::cpu {
namespace {

constexpr int kRowsPerTask = 4;
constexpr int kColumns = 64;  // summed at a time, in registers

struct CutSequence {
  int sequence;
  int first_part, last_part;  // first leaves it unfinished, the others continue it
};

std::vector<CutSequence> cut_sequences(const std::vector<Cut>& cuts) {
  std::vector<CutSequence> found;
  for (int part = 0; part + 1 < static_cast<int>(cuts.size()); ++part) {
    const Cut begin = cuts[part], end = cuts[part + 1];
    if (end.tile == 0) continue;
    if (begin.sequence == end.sequence && begin.tile > 0) {
      found.back().last_part = part + 1;
    } else {
      found.push_back({end.sequence, part, part + 1});
    }
  }
  return found;
}

// `row` counts [s_q, h_q] within the sequence; `weights` is room for one float per part.
template <class Element>
void merge_row(const DenseDecodeParams& params, const CutSequence& cut, int64_t row,
               std::vector<float>& weights) {
  const int64_t rows = int64_t{params.s_q} * params.h_q;
  const int num_pieces = cut.last_part - cut.first_part + 1;
  const auto slot_row = [&](int piece) {
    return piece_slot(cut.first_part + piece, /*continued=*/piece > 0) * rows + row;
  };

  const float kInfinity = std::numeric_limits<float>::infinity();
  float max = -kInfinity;
  for (int piece = 0; piece < num_pieces; ++piece) {
    max = std::max(max, params.lse_accum[slot_row(piece)]);
  }
  if (max == -kInfinity) max = 0.0f;  // nothing attended: every weight is 2^-inf = 0
  float sum = 0.0f;
  weights.resize(num_pieces);
  for (int piece = 0; piece < num_pieces; ++piece) {
    weights[piece] = std::exp2(params.lse_accum[slot_row(piece)] - max);
    sum += weights[piece];
  }
  const float scale = sum == 0.0f ? 0.0f : 1.0f / sum;
  const int64_t out_row = cut.sequence * rows + row;
  params.lse[out_row] = (max + std::log2(sum)) * kLn2;

  auto* out = static_cast<Element*>(params.out) + out_row * params.d_v;
  for (int column = 0; column < params.d_v; column += kColumns) {
    const int n = std::min(kColumns, params.d_v - column);
    float total[kColumns] = {};
    for (int piece = 0; piece < num_pieces; ++piece) {
      if (weights[piece] == 0.0f) continue;
      const float* from = params.out_accum + slot_row(piece) * params.d_v + column;
      for (int c = 0; c < n; ++c) total[c] += weights[piece] * from[c];
    }
    for (int c = 0; c < n; ++c) out[column + c] = Element::from_float(total[c] * scale);
  }
}

}  // namespace

void merge(const DenseDecodeParams& params, const std::vector<Cut>& cuts,
           const ParallelFor& parallel_for) {
  const std::vector<CutSequence> found = cut_sequences(cuts);
  const int64_t rows = int64_t{params.s_q} * params.h_q;
  const auto tasks_per_sequence = static_cast<int>((rows + kRowsPerTask - 1) / kRowsPerTask);
  parallel_for(static_cast<int>(found.size()) * tasks_per_sequence, [&](int task) {
    static thread_local std::vector<float> weights;
    const CutSequence& cut = found[task / tasks_per_sequence];
    const int64_t begin = int64_t{task % tasks_per_sequence} * kRowsPerTask;
    with_element(params.dtype, [&](auto element) {
      for (int64_t row = begin; row < std::min(begin + kRowsPerTask, rows); ++row) {
        merge_row<decltype(element)>(params, cut, row, weights);
      }
    });
  });
}

}  // namespace flashmla::cpu
