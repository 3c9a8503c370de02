#include "cpu/latent_append.h"

#include <cmath>
#include <cstdint>
#include <vector>

#include "cpu/store_row.h"
#include "elements.h"

namespace flashmla::cpu {
namespace {

template <class Element>
float load(const void* array, int64_t i) {
  return Element::to_float(static_cast<const Element*>(array)[i]);
}

template <class Element>
float round_to(float x) {
  return Element::to_float(Element::from_float(x));
}

// put(i, value) for columns [begin, begin + n) of a row, over their root mean square, times weight.
template <class Element, class Put>
void rms_norm(const Element* row, int n, const void* weight, DType weight_dtype, float eps,
              float scale, const Put& put) {
  float sum = 0;
  for (int i = 0; i < n; ++i) {
    const float x = Element::to_float(row[i]);
    sum += x * x;
  }
  const float inverse = 1.0f / std::sqrt(sum / static_cast<float>(n) + eps);
  with_element(weight_dtype, [&](auto w) {
    for (int i = 0; i < n; ++i) {
      const float factor = load<decltype(w)>(weight, i) * scale;
      put(i, Element::to_float(row[i]) * inverse * factor);
    }
  });
}

// row [d] in float32, each number rounded to Element.
template <class Element>
void make_row(const LatentAppendParams& params, const Element* from, int64_t index, float* row) {
  rms_norm(from, params.kv_rank, params.kv_norm, params.norm_dtype, params.kv_eps,
           params.latent_scale, [&](int i, float x) { row[i] = round_to<Element>(x); });
  const Element* key = from + params.kv_rank;
  float* turned = row + params.kv_rank;
  if (params.layout == RopeLayout::kNone) {
    for (int i = 0; i < params.rope; ++i) turned[i] = Element::to_float(key[i]);
    return;
  }
  const int pairs = params.rope / 2;
  for (int pair = 0; pair < pairs; ++pair) {
    const RopePair at = rope_pair(params.layout, pair, pairs);
    const float cos = params.cos[index * pairs + pair], sin = params.sin[index * pairs + pair];
    const float x = Element::to_float(key[at.from[0]]), y = Element::to_float(key[at.from[1]]);
    turned[at.to[0]] = round_to<Element>(x * cos - y * sin);
    turned[at.to[1]] = round_to<Element>(y * cos + x * sin);
  }
}

template <class Element>
void run_row(const LatentAppendParams& params, int64_t index) {
  const auto* from = static_cast<const Element*>(params.projected) + index * params.columns;
  if (params.q_rank > 0) {
    Element* to = static_cast<Element*>(params.q_latent) + index * params.q_rank;
    rms_norm(from, params.q_rank, params.q_norm, params.norm_dtype, params.q_eps, 1.0f,
             [&](int i, float x) { to[i] = Element::from_float(x); });
  }
  const CacheAppendParams& cache = params.cache;
  const AppendSlot slot = find_slot(cache, index / cache.s_new, index % cache.s_new);
  if (slot.block < 0) return;
  std::vector<float> row(cache.d);
  make_row(params, from + params.q_rank, index, row.data());
  with_element(cache.rows_dtype, [&](auto element) {
    using Stored = decltype(element);
    std::vector<Stored> rounded(cache.d);
    for (int i = 0; i < cache.d; ++i) rounded[i] = Stored::from_float(row[i]);
    store_row(cache, rounded.data(), slot);
  });
}

}  // namespace

Status run_latent_append(const LatentAppendParams& params, const ParallelFor& parallel_for) {
  begin_append(params.cache);
  parallel_for(params.cache.b * params.cache.s_new, [&](int index) {
    with_element(params.dtype, [&](auto element) { run_row<decltype(element)>(params, index); });
  });
  return Status::Ok();
}

}  // namespace flashmla::cpu
