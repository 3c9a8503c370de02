// What the softmax of sparse decode has beside attention/softmax.cuh: sinks.
#pragma once

#include "sm90/attention/softmax.cuh"

namespace flashmla::sm90::sparse {

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
