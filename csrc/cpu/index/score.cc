#include "cpu/index/score.h"

#include <array>
#include <cstring>

#include "elements.h"
#include "quantise.h"

#define FLASHMLA_SIMD_SOURCE "cpu/index/score_simd.h"
#include "cpu/each_isa.h"

namespace flashmla::cpu {
namespace {

using CodeValues = std::array<float, 256>;

const CodeValues& e4m3_values() {
  static const CodeValues values = [] {
    CodeValues filled;
    for (int code = 0; code < 256; ++code) filled[code] = e4m3_to_float(code);
    return filled;
  }();
  return values;
}

void score_block_best(const IndexQueries& queries, const uint8_t* block, const float* value_of,
                      float* scores, int64_t stride) {
  FLASHMLA_RUN_BEST_ISA(score_block(queries, block, value_of, scores, stride));
}

}  // namespace

void IndexQueries::load(const IndexScoresParams& params, int64_t first, int n) {
  num_tokens = n;
  head_groups = (params.heads + kHeadGroup - 1) / kHeadGroup;
  const int heads = head_groups * kHeadGroup;
  q.assign(size_t{kIndexColumns} * n * heads, 0.0f);
  weights.assign(size_t(n) * heads, 0.0f);
  const CodeValues& value_of = e4m3_values();
  const auto* codes = static_cast<const uint8_t*>(params.q);
  const auto* halves = static_cast<const BFloat16*>(params.q);
  for (int i = 0; i < n; ++i) {
    for (int head = 0; head < params.heads; ++head) {
      const int64_t row = (first + i) * params.heads + head;
      weights[i * heads + head] = params.weights[row];
      float* to = q.data() + (i * head_groups + head / kHeadGroup) * kIndexColumns * kHeadGroup +
                  head % kHeadGroup;
      for (int k = 0; k < kIndexColumns; ++k) {
        const int64_t from = row * kIndexColumns + k;
        to[k * kHeadGroup] =
            params.fp8_queries ? value_of[codes[from]] : BFloat16::to_float(halves[from]);
      }
    }
  }
}

void score_block(const IndexQueries& queries, const uint8_t* block, float* scores, int64_t stride) {
  score_block_best(queries, block, e4m3_values().data(), scores, stride);
}

}  // namespace flashmla::cpu
