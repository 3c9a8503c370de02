// The columns of x that are not multiplied but rotated, and put behind the products.
#pragma once

#include <cstdint>

#include "elements.h"
#include "params/project.h"

namespace flashmla::sm90::project {

// Of one group, by thread `first` of `threads`.
template <class Element>
__device__ __forceinline__ void turn_columns(const ProjectParams& params, int group, int first,
                                             int threads) {
  const bool turned = params.layout != RopeLayout::kNone;
  const int pairs = turned ? params.rope / 2 : params.rope;  // without rotation: single columns
#pragma unroll 1
  for (int i = first; i < params.rows * pairs; i += threads) {
    const int64_t row = i / pairs, at = row * params.groups + group;
    const int pair = i % pairs;
    const auto* from =
        static_cast<const Element*>(params.x) + at * (params.k + params.rope) + params.k;
    auto* to = static_cast<Element*>(params.y) + at * (params.n + params.rope) + params.n;
    if (!turned) {
      to[pair] = from[pair];
      continue;
    }
    const RopePair columns = rope_pair(params.layout, pair, pairs);
    const float cos = params.cos[row * pairs + pair], sin = params.sin[row * pairs + pair];
    const float a = Element::to_float(from[columns.from[0]]);
    const float b = Element::to_float(from[columns.from[1]]);
    to[columns.to[0]] = Element::from_float(a * cos - b * sin);
    to[columns.to[1]] = Element::from_float(b * cos + a * sin);
  }
}

}  // namespace flashmla::sm90::project
