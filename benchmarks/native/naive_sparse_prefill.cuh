// Random queries and rows, and a naive sparse prefill over them in double precision: what
// bench_sparse_prefill.cu holds the kernel against.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "naive_attend.cuh"
#include "noise.cuh"
#include "params/sparse_prefill.h"

__device__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ float to_float(__half x) { return __half2float(x); }

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
  auto key = [&](int t) -> const T* {
    if (indices[t] < 0 || indices[t] >= p.s_kv) return nullptr;
    return static_cast<const T*>(p.kv) + int64_t(indices[t]) * p.d_qk;
  };
  const auto score = [&](int t) {
    const T* k = key(t);
    double dot = 0;
    for (int d = 0; k && d < p.d_qk; ++d) dot += double(to_float(q[d])) * to_float(k[d]);
    return k ? dot * p.sm_scale : -INFINITY;
  };
  const auto value = [&](int t, int d) { return to_float(key(t)[d]); };
  const float* sink = p.attn_sink ? p.attn_sink + head : nullptr;
  const double peak =
      naive_attend(length, p.d_v, s, score, value, sink, out + int64_t(row) * p.d_v, lse + row);
  if (threadIdx.x == 0) max_logits[row] = peak;
}
