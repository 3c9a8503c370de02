// How a piece's results lie in the workspace: 16-bit floats, scaled for each half row.
//
// A row of the workspace (kColumns f32) holds kColumns f16, in the order of the output's registers:
// of each 32 columns a quad's lane t keeps 2t and 2t + 1 of every eight, 16 bytes. Then, at float
// partial_scale(kColumns), what the left and the right half are to be multiplied with, a power of
// two. It brings the half's largest value near f16's largest: rounding is to 2^-11 of a value,
// against 2^-8 in a bf16 result.
#pragma once

#include <cstdint>

namespace flashmla::sm90 {

// Where a row's two scales are, in floats from its beginning.
constexpr int partial_scale(int columns) { return columns / 2; }

// x: -126 to 127.
__device__ __forceinline__ float power_of_two(int x) { return __int_as_float((127 + x) << 23); }

// The exponent by which values of up to `peak` are to be divided. Bounded, so that neither scale
// nor its inverse leaves f32.
__device__ __forceinline__ int partial_exponent(float peak) {
  const int exponent = (__float_as_int(peak) >> 23) - 127;  // peak < 2^(exponent + 1)
  return min(max(exponent, -96), 127) - 14;                 // values stay below 2^15
}

}  // namespace flashmla::sm90
