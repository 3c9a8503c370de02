// Random queries and rows of v32 caches, and a naive sparse decode over them in double precision:
// what bench_sparse_decode.cu holds the kernel against.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp8.h>

#include <cstdint>

#include "params/sparse_decode.h"

using T = __nv_bfloat16;
using flashmla::SparseDecodeParams;
constexpr int kDqk = 576, kDv = 512, kRowBytes = 656, kGroup = 128;

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

__global__ void fill_queries(T* p, uint64_t n, uint32_t seed, float scale) {
  for (uint64_t i = blockIdx.x * uint64_t(blockDim.x) + threadIdx.x; i < n;
       i += gridDim.x * uint64_t(blockDim.x))
    p[i] = __float2bfloat16(scale * noise(i, seed));
}

// Writes v32 rows; `slots` null: all. spread: scales are 2^(uniform in +-spread), else those that
// quantising would choose.
__global__ void fill_rows(uint8_t* pool, const int64_t* slots, uint64_t n, uint32_t seed,
                          int spread) {
  for (uint64_t i = blockIdx.x; i < n; i += gridDim.x) {
    uint8_t* row = pool + (slots ? slots[i] : i) * kRowBytes;
    const int t = threadIdx.x, group = t / 32;
    float x[4], peak = 0;
    for (int j = 0; j < 4; ++j) {
      x[j] = fminf(fmaxf(0.1f * noise(i * 512 + t * 4 + j, seed), -1.f), 1.f);
      peak = fmaxf(peak, fabsf(x[j]));
    }
    for (int s = 16; s > 0; s /= 2) peak = fmaxf(peak, __shfl_xor_sync(~0u, peak, s));
    const float quantised = exp2f(ceilf(log2f(fmaxf(peak / 448, 1e-4f))));
    for (int j = 0; j < 4; ++j)
      row[t * 4 + j] = __nv_cvt_float_to_fp8(x[j] / quantised, __NV_SATFINITE, __NV_E4M3);
    const int power = int(hash(i * 4 + group, seed + 5) % (2 * spread + 1)) - spread;
    if (t % 32 == 0)
      reinterpret_cast<float*>(row + 512)[group] = spread ? exp2f(float(power)) : quantised;
    if (t < 64)
      reinterpret_cast<T*>(row + 528)[t] = __float2bfloat16(0.1f * noise(i * 64 + t, seed + 1));
  }
}

__device__ float dequantise(const uint8_t* row, int d) {
  if (d >= kDv) return __bfloat162float(reinterpret_cast<const T*>(row + 528)[d - kDv]);
  const __half_raw code = __nv_cvt_fp8_to_halfraw(row[d], __NV_E4M3);
  const float scale = reinterpret_cast<const float*>(row + 512)[d / kGroup];
  return __bfloat162float(
      __hmul(__float2bfloat16(__half2float(__half(code))), __float2bfloat16(scale)));
}

// One thread block a query row; scores in global memory.
__global__ void naive(SparseDecodeParams p, double* scores, float* out, float* lse) {
  const int row = blockIdx.x, query = row / p.h_q, head = row % p.h_q;
  const auto& m = p.main;
  const int length = m.topk_length ? min(max(m.topk_length[query], 0), m.topk) : m.topk;
  const T* q = static_cast<const T*>(p.q) + int64_t(row) * kDqk;
  double* s = scores + int64_t(row) * m.topk;
  __shared__ double reduce[256];
  auto key = [&](int t) -> const uint8_t* {
    const int64_t slot = m.indices[int64_t(query) * m.topk + t];
    if (slot < 0 || slot >= m.layer_blocks * m.block_size) return nullptr;
    const int64_t block = slot / m.block_size + (m.first_block ? *m.first_block : 0);
    return static_cast<const uint8_t*>(m.blocks) + block * m.block_bytes +
           slot % m.block_size * kRowBytes;
  };
  double peak = -INFINITY;
  for (int t = threadIdx.x; t < length; t += 256) {
    const uint8_t* k = key(t);
    double dot = 0;
    for (int d = 0; k && d < kDqk; ++d) dot += double(__bfloat162float(q[d])) * dequantise(k, d);
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
  for (int d = threadIdx.x; d < kDv; d += 256) {
    double o = 0;
    for (int t = 0; t < length; ++t) {
      const uint8_t* k = key(t);
      if (k) o += exp(s[t] - peak) * dequantise(k, d);
    }
    out[int64_t(row) * kDv + d] = sum > 0 ? o / sum * share : 0;
  }
  if (threadIdx.x == 0) lse[row] = sum > 0 ? natural : -INFINITY;
}
