// Attention from its definition in double precision: what the kernels are held against.
#pragma once

constexpr int kNaiveThreads = 256;

template <typename Op>
__device__ double over_block(double x, const Op& op) {
  __shared__ double all[kNaiveThreads];
  __syncthreads();
  all[threadIdx.x] = x;
  __syncthreads();
  x = all[0];
  for (int i = 1; i < kNaiveThreads; ++i) x = op(x, all[i]);
  return x;
}

// One query row, by a thread block, over `length` cache rows. score(t) is -inf where row t is not
// attended, value(t, d) one of its d_v values; s: room for the scores. Returns the largest score.
template <typename Score, typename Value>
__device__ double naive_attend(int length, int d_v, double* s, const Score& score,
                               const Value& value, const float* sink, float* out, float* lse) {
  double peak = -INFINITY, sum = 0;
  for (int t = threadIdx.x; t < length; t += kNaiveThreads) peak = fmax(peak, s[t] = score(t));
  peak = over_block(peak, [](double a, double b) { return fmax(a, b); });
  for (int t = threadIdx.x; t < length && peak > -INFINITY; t += kNaiveThreads)
    sum += s[t] = exp(s[t] - peak);
  sum = over_block(sum, [](double a, double b) { return a + b; });
  const double natural = peak + log(sum);
  const double share = sink ? 1 / (1 + exp(double(*sink) - natural)) : 1;
  for (int d = threadIdx.x; d < d_v; d += kNaiveThreads) {
    double o = 0;
    for (int t = 0; t < length && sum > 0; ++t)
      if (s[t] > 0) o += s[t] * value(t, d);
    out[d] = sum > 0 ? o / sum * share : 0;
  }
  if (threadIdx.x == 0) *lse = sum > 0 ? natural : -INFINITY;
  return peak;
}
