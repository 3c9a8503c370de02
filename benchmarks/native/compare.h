// How far results are from the expected.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "device_arrays.h"

// An element is within the absolute or the relative bound.
struct Bounds {
  double absolute, relative, cosine = INFINITY;
};

struct Errors {
  double worst = 0, cosine = 0;  // cosine: the distance of the arrays as a whole
  size_t worst_at = 0, bad = 0, first_bad = ~size_t{0};

  bool within(const Bounds& bounds) const { return bad == 0 && cosine < bounds.cosine; }
};

template <typename A, typename B>
Errors errors_of(const std::vector<A>& got, const std::vector<B>& want, const Bounds& bounds) {
  Errors errors;
  double dot = 0, squares = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    const double a = float(got[i]), b = float(want[i]);
    if (std::isfinite(a) && std::isfinite(b)) dot += a * b, squares += a * a + b * b;
    if (a == b) continue;  // infinities too
    const double error = std::abs(a - b);
    if (!std::isfinite(error) || error > std::max(bounds.absolute, bounds.relative * std::abs(b)))
      ++errors.bad, errors.first_bad = std::min(errors.first_bad, i);
    if (error > errors.worst) errors.worst = error, errors.worst_at = i;
  }
  if (squares > 0) errors.cosine = 1 - 2 * dot / squares;
  return errors;
}

// How many of `count` reruns leave other bits than `got` at `out`.
template <typename V, typename Run>
int differing_reruns(int count, const std::vector<V>& got, const void* out, const Run& run) {
  int differing = 0;
  for (int rerun = 0; rerun < count; ++rerun) {
    run();
    const auto again = DeviceArrays::download<V>(out, got.size());
    differing += std::memcmp(again.data(), got.data(), got.size() * sizeof(V)) != 0;
  }
  return differing;
}

// Of ratios.
struct GeometricMean {
  double log_sum = 0;
  int count = 0;

  void add(double ratio) { log_sum += std::log(ratio), ++count; }
  double value() const { return std::exp(log_sum / count); }
};
