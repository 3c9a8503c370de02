// What project is given.
// All arrays are dense and row-major. Extents have been checked against one another by ffi/.
#pragma once

#include <cstdint>

#include "params/dtype.h"
#include "params/rope.h"

namespace flashmla {

constexpr int kMaxWeights = 3;

// Where products of one weight go: its column j of row i and group g to y[(i * groups + g) * stride
// + j].
struct ProjectOutput {
  void* y;
  int64_t stride;
};

// y[i, g, j] = sum over l < k of x[i, g, l] * w[g, l, j] for j < n, in float32, where w is up to
// three arrays side by side. Columns of x from k on are rotated and lie in y behind those.
struct ProjectParams {
  DType dtype;  // of x, w and y
  int rows, groups, k;
  int n;                  // columns of the weights whose products lie in y
  int n_of[kMaxWeights];  // of each; 0 where there is none
  int rope;               // columns of x from k on
  int exact_n;      // columns of the float32 weight, whose products are not rounded; 0 without
  bool transposed;  // each w is [groups, n, k]
  RopeLayout layout;

  const void* x;                   // [rows, groups, k + rope]
  const void* w[kMaxWeights];      // [groups, k, n_of]
  const float* cos;                // [rows, rope / 2]; empty with kNone
  const float* sin;                // as cos
  const float* exact_w;            // [groups, k, exact_n]
  void* y;                         // [rows, groups, n + rope]
  ProjectOutput out[kMaxWeights];  // of each weight: in y, or in an array of its own
  float* exact_y;                  // [rows, groups, exact_n]
};

}  // namespace flashmla
