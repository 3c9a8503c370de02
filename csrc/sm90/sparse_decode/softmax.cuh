// The online softmax of a row, in base 2. (The dense decode kernels have the same steps.)
#pragma once

#include "sm90/ptx/math.cuh"

namespace flashmla::sm90::sparse {

// How far (base-2) a row's maximum may outgrow its reference before the output is rescaled.
constexpr float kLazyRescale = 8.0f;
constexpr float kForget = 127.0f;  // halvings that leave nothing in f32

// 2^-power; 0 from 127 on.
__device__ __forceinline__ float rescale_factor(int power) {
  return __int_as_float((127 - min(power, 127)) << 23);
}

// Moves a row's reference, the base-2 exponent that maps to 1, by a whole number if a tile's
// largest score (scaled) asks for it. Returns by what power of two the row's sum and output are to
// be divided. The first reference is the first tile's maximum.
__device__ __forceinline__ int raise_reference(float& reference, float scaled_peak) {
  const float before = reference;
  const float rise = scaled_peak - before;  // infinite from -inf, NaN where it stays -inf
  const float steps = rise > kLazyRescale ? ceilf(rise) : 0.0f;
  // Where nothing is left of what was before, no rounding of huge scores may be.
  reference = before == -INFINITY || steps >= kForget ? scaled_peak : before + steps;
  return static_cast<int>(fminf(steps, kForget));
}

// What to subtract from a row's scores; anything finite will do while it has seen no key.
__device__ __forceinline__ float finite_reference(float reference) {
  return reference == -INFINITY ? 0.0f : reference;
}

// Log-sum-exp of a row in base 2.
__device__ __forceinline__ float row_lse_log2(float reference, float sum) {
  return sum > 0.0f ? reference + __log2f(sum) : -INFINITY;
}

// What a sink leaves of a row's output: exp(lse) / (exp(lse) + exp(sink)). lse base 2, sink
// natural.
__device__ __forceinline__ float sink_share(float lse_log2, float sink) {
  return reciprocal_approx(1.0f + exp2_approx(sink / kLn2 - lse_log2));
}

}  // namespace flashmla::sm90::sparse
