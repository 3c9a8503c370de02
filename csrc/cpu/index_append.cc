#include "cpu/index_append.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu/store_row.h"
#include "elements.h"
#include "quantise.h"

namespace flashmla::cpu {
namespace {

constexpr int kColumns = kIndexColumns;

template <class Element>
float round_to(float x) {
  return Element::to_float(Element::from_float(x));
}

template <class Element>
void load_row(const void* rows, int64_t begin, float (&x)[kColumns]) {
  const auto* from = static_cast<const Element*>(rows) + begin;
  for (int i = 0; i < kColumns; ++i) x[i] = Element::to_float(from[i]);
}

// LayerNorm.
template <class Element>
void norm_row(const IndexAppendParams& params, float (&x)[kColumns]) {
  float sum = 0, squares = 0;
  for (float column : x) sum += column;
  for (float& column : x) {
    column -= sum / kColumns;
    squares += column * column;
  }
  const float inverse = 1.0f / std::sqrt(squares / kColumns + params.eps);
  with_element(params.norm_dtype, [&](auto element) {
    using Weight = decltype(element);
    const auto* weight = static_cast<const Weight*>(params.k_norm);
    const auto* bias = static_cast<const Weight*>(params.k_bias);
    for (int i = 0; i < kColumns; ++i) {
      x[i] = round_to<Element>(x[i] * inverse * Weight::to_float(weight[i]) +
                               Weight::to_float(bias[i]));
    }
  });
}

template <class Element>
void turn_row(const IndexAppendParams& params, int64_t token, float (&x)[kColumns]) {
  float from[kColumns];
  std::memcpy(from, x, sizeof(x));
  for (int pair = 0; pair < params.pairs; ++pair) {
    const RopePair at = rope_pair(params.layout, pair, params.pairs);
    const float cos = params.cos[token * params.pairs + pair];
    const float sin = params.sin[token * params.pairs + pair];
    const float first = from[at.from[0]], second = from[at.from[1]];
    x[at.to[0]] = round_to<Element>(first * cos - second * sin);
    x[at.to[1]] = round_to<Element>(second * cos + first * sin);
  }
}

// The product with a Hadamard matrix: sums and differences of columns half apart.
template <class Element>
void spread_row(float (&x)[kColumns]) {
  for (int half = 1; half < kColumns; half *= 2) {
    for (int i = 0; i < kColumns; ++i) {
      if (i & half) continue;
      const float first = x[i], second = x[i + half];
      x[i] = first + second;
      x[i + half] = first - second;
    }
  }
  for (float& column : x) column = round_to<Element>(column * kHadamardScale);
}

template <class Element>
void finish_row(const IndexAppendParams& params, int64_t token, float (&x)[kColumns],
                Element (&row)[kColumns]) {
  turn_row<Element>(params, token, x);
  if (params.hadamard) spread_row<Element>(x);
  for (int i = 0; i < kColumns; ++i) row[i] = Element::from_float(x[i]);
}

// The scale of a query row's codes.
template <class Element>
float quantise_query(const Element (&row)[kColumns], uint8_t* codes) {
  constexpr FormatLayout layout = layout_of(Format::kFp8Index);
  uint32_t amax = 0;
  for (const Element& x : row) amax = std::max(amax, amax_bits(layout, load_finite(x)));
  const GroupScale scale = group_scale(layout, amax, 1.0f);
  for (int i = 0; i < kColumns; ++i) codes[i] = encode(layout, scale, load_finite(row[i]));
  return scale.scale;
}

template <class Element>
void run_token(const IndexAppendParams& params, int64_t token) {
  float x[kColumns];
  Element row[kColumns];
  for (int64_t i = token * params.heads; i < (token + 1) * params.heads; ++i) {
    load_row<Element>(params.q, i * kColumns, x);
    finish_row(params, token, x, row);
    const float scale = quantise_query(row, params.codes + i * kColumns);
    params.scaled[i] = params.weights[i] * params.weight_scale * scale;
  }
  const CacheAppendParams& cache = params.cache;
  const AppendSlot slot = find_slot(cache, token / cache.s_new, token % cache.s_new);
  if (slot.block < 0) return;
  load_row<Element>(params.projected, (token + 1) * params.columns - kColumns, x);
  norm_row<Element>(params, x);
  finish_row(params, token, x, row);
  store_row(cache, row, slot);
}

}  // namespace

Status run_index_append(const IndexAppendParams& params, const ParallelFor& parallel_for) {
  const CacheAppendParams& cache = params.cache;
  begin_append(cache);
  parallel_for(cache.b * cache.s_new, [&](int token) {
    with_element(cache.rows_dtype, [&](auto e) { run_token<decltype(e)>(params, token); });
  });
  return Status::Ok();
}

}  // namespace flashmla::cpu
