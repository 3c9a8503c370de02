// A vector is 16 bytes of x: 8 elements of 16 bits, or 4 of 32.
#pragma once

#include <cstdint>

#include "elements.h"

namespace flashmla::sm90::all_reduce_sum {

template <class Element>
constexpr int kElements = 16 / sizeof(Element);

// Element i of a vector, i known when compiling.
template <class Element>
__device__ __forceinline__ Element element_of(const uint4& v, int i) {
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
  if constexpr (sizeof(Element) == 4) {
    return Element{float_of_bits(words[i])};
  } else {
    return Element{static_cast<uint16_t>(words[i / 2] >> (16 * (i % 2)))};
  }
}

template <class Element>
__device__ __forceinline__ uint4 vector_of_floats(const float (&values)[kElements<Element>]) {
  uint32_t words[4] = {};
#pragma unroll
  for (int i = 0; i < kElements<Element>; ++i) {
    if constexpr (sizeof(Element) == 4) {
      words[i] = bits_of_float(values[i]);
    } else {
      words[i / 2] |= uint32_t{Element::from_float(values[i]).bits} << (16 * (i % 2));
    }
  }
  return {words[0], words[1], words[2], words[3]};
}

// The vector that begins with element `first` of out[elements]; nothing past its end.
template <class Element>
__device__ __forceinline__ void store_vector(Element* out, int64_t first, int64_t elements,
                                             const uint4& v) {
  if (first + kElements<Element> <= elements) {
    *reinterpret_cast<uint4*>(out + first) = v;
    return;
  }
#pragma unroll
  for (int i = 0; i < kElements<Element>; ++i) {
    if (first + i < elements) out[first + i] = element_of<Element>(v, i);
  }
}

// The f32 sums of a vector's elements.
template <class Element>
struct Sums {
  float sum[kElements<Element>] = {};

  __device__ __forceinline__ void add(const uint4& v) {
#pragma unroll
    for (int i = 0; i < kElements<Element>; ++i) {
      sum[i] += Element::to_float(element_of<Element>(v, i));
    }
  }

  __device__ __forceinline__ uint4 rounded() const { return vector_of_floats<Element>(sum); }
};

}  // namespace flashmla::sm90::all_reduce_sum
