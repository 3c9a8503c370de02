// Random queries and rows, and a naive sparse prefill over them in double precision: what
// bench_sparse_prefill.cu holds the kernel against.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "params/sparse_prefill.h"

__device__ uint64_t hash(uint64_t i, uint32_t seed) {
  uint64_t x = i * 0x9E3779B97F4A7C15ull + seed;
  for (int r = 0; r < 2; ++r)
    x ^= x >> 31, x *= 0xBF58476D1CE4E5B9ull, x ^= x >> 27, x *= 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

__device__ float noise(uint64_t i, uint32_t seed) {
  float sum = 0;
  for (int r = 0; r < 2; ++r) {
    const uint64_t x = hash(2 * i + r, seed);
    sum += float(uint32_t(x)) + float(uint32_t(x >> 32));
  }
  return (sum * 0x1p-32f - 2.0f) * 1.7320508f;  // mean 0, variance 1
}

__device__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ float to_float(__half x) { return __half2float(x); }

template <typename T>
__global__ void fill_normal(T* p, uint64_t n, uint32_t seed, float scale) {
  for (uint64_t i = blockIdx.x * uint64_t(blockDim.x) + threadIdx.x; i < n;
       i += gridDim.x * uint64_t(blockDim.x))
    p[i] = T(scale * noise(i, seed));
}

// Every `step`th row normal, the others NaN.
template <typename T>
__global__ void fill_rows(T* p, int64_t rows, int columns, int step, uint32_t seed) {
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x)
    for (int d = threadIdx.x; d < columns; d += blockDim.x)
      p[row * columns + d] = row % step == 0 ? T(0.1f * noise(row * columns + d, seed))
                                             : T(__int_as_float(0x7fc00000));
}

__global__ void fill_indices(int32_t* p, int64_t n, int rows, uint32_t seed) {
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < n;
       i += int64_t(gridDim.x) * blockDim.x)
    p[i] = hash(i, seed) % rows;
}

// One thread block a query row; scores [s_q * h_q, topk] in global memory.
template <typename T>
__global__ void naive(flashmla::SparsePrefillParams p, double* scores, float* out, float* lse,
                      float* max_logits) {
  const int row = blockIdx.x, query = row / p.h_q, head = row % p.h_q;
  const int length = p.topk_length ? min(max(p.topk_length[query], 0), p.topk) : p.topk;
  const T* q = static_cast<const T*>(p.q) + int64_t(row) * p.d_qk;
  const int32_t* indices = p.indices + int64_t(query) * p.topk;
  double* s = scores + int64_t(row) * p.topk;
  __shared__ double reduce[256];
  auto key = [&](int t) -> const T* {
    if (indices[t] < 0 || indices[t] >= p.s_kv) return nullptr;
    return static_cast<const T*>(p.kv) + int64_t(indices[t]) * p.d_qk;
  };
  double peak = -INFINITY;
  for (int t = threadIdx.x; t < length; t += 256) {
    const T* k = key(t);
    double dot = 0;
    for (int d = 0; k && d < p.d_qk; ++d) dot += double(to_float(q[d])) * to_float(k[d]);
    s[t] = k ? dot * p.sm_scale : -INFINITY;
    peak = fmax(peak, s[t]);
  }
  reduce[threadIdx.x] = peak;
  __syncthreads();
  for (int i = 0; i < 256; ++i) peak = fmax(peak, reduce[i]);
  __syncthreads();
  double sum = 0;
  for (int t = threadIdx.x; t < length; t += 256)
    if (peak > -INFINITY) sum += exp(s[t] - peak);
  reduce[threadIdx.x] = sum;
  __syncthreads();
  sum = 0;
  for (int i = 0; i < 256; ++i) sum += reduce[i];
  const double natural = peak + log(sum);
  double share = 1;
  if (p.attn_sink) share = 1 / (1 + exp(double(p.attn_sink[head]) - natural));
  for (int d = threadIdx.x; d < p.d_v; d += 256) {
    double o = 0;
    for (int t = 0; t < length; ++t) {
      const T* k = key(t);
      if (k) o += exp(s[t] - peak) * to_float(k[d]);
    }
    out[int64_t(row) * p.d_v + d] = sum > 0 ? o / sum * share : 0;
  }
  if (threadIdx.x > 0) return;
  lse[row] = sum > 0 ? natural : -INFINITY;
  max_logits[row] = peak;
}
