// The online softmax of a row, in base 2.
#pragma once

#include "sm90/ptx/math.cuh"

namespace flashmla::sm90 {

// How far (base-2) a row's maximum may outgrow its reference before the output is rescaled.
// Probabilities then reach 2^8, harmless in f32 sums and in 16-bit products.
constexpr float kLazyRescale = 8.0f;
constexpr float kMaxShift = 127.0f;  // 2^-127 flushes to 0

// 2^-power; 0 from 127 on.
__device__ __forceinline__ float rescale_factor(int power) {
  return __int_as_float((127 - min(power, 127)) << 23);
}

// Whether a score of a row, not yet scaled, asks for its reference to be moved. True where there is
// no reference yet, false for a score of -inf.
__device__ __forceinline__ bool outgrows(float score, float scale_log2, float reference) {
  return fmaf(score, scale_log2, -reference) > kLazyRescale;
}

// Moves a row's reference, the base-2 exponent that maps to 1, by a whole number if a tile's
// largest score asks for it. Returns by what power of two the row's sum, which is divided here, and
// output are to be divided. The first reference is the first tile's maximum: the largest
// probability of a short sequence is then exactly 1. Without branches, which would take longer.
__device__ __forceinline__ int raise_reference(float& reference, float& sum, float scaled_peak) {
  const float before = reference;
  const float rise = scaled_peak - before;  // infinite from -inf, NaN where it stays -inf
  const float steps = rise > kLazyRescale ? ceilf(rise) : 0.0f;
  reference = before == -INFINITY ? scaled_peak : before + steps;
  const int power = static_cast<int>(fminf(steps, kMaxShift));
  sum *= rescale_factor(power);
  return power;
}

// The same for scores of any size, which are scaled and rounded before the reference is subtracted:
// where nothing is left of what was before, it becomes the largest of them, so that this one, less
// itself, is 0. The caller divides the sum.
__device__ __forceinline__ int raise_reference(float& reference, float scaled_peak) {
  const float before = reference;
  const float rise = scaled_peak - before;  // infinite from -inf, NaN where it stays -inf
  const float steps = rise > kLazyRescale ? ceilf(rise) : 0.0f;
  reference = before == -INFINITY || steps >= kMaxShift ? scaled_peak : before + steps;
  return static_cast<int>(fminf(steps, kMaxShift));
}

// What to subtract from a row's scores; anything finite will do while it has seen no key.
__device__ __forceinline__ float finite_reference(float reference) {
  return reference == -INFINITY ? 0.0f : reference;
}

// 0 for a row that has seen no key.
__device__ __forceinline__ float inverse_of_sum(float sum) {
  return sum > 0.0f ? reciprocal_approx(sum) : 0.0f;
}

// Log-sum-exp of a row: base 2 if partial, else natural.
__device__ __forceinline__ float row_lse(float reference, float sum, bool partial) {
  const float lse = sum > 0.0f ? reference + __log2f(sum) : -INFINITY;
  return partial ? lse : lse * kLn2;
}

}  // namespace flashmla::sm90
