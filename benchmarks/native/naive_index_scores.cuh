// A naive indexer, and what bench_index_topk.cu fills caches with.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <vector>

#include "params/index_scores.h"

constexpr int kBlockBytes = 64 * 132;

__device__ inline uint32_t hash(uint64_t i, uint32_t seed) {
  uint64_t x = i * 0x9E3779B97F4A7C15ull + seed * 0xD1B54A32D192ED03ull;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return static_cast<uint32_t>(x >> 32);
}

__device__ inline float uniform(uint64_t i, uint32_t seed) { return hash(i, seed) * 0x1p-32f; }

// Roughly normal.
__device__ inline float normal(uint64_t i, uint32_t seed) {
  float sum = -2;
  for (int k = 0; k < 4; ++k) sum += uniform(i * 4 + k, seed);
  return sum * 1.7f;
}

__device__ inline uint8_t to_e4m3(float x) {
  uint16_t codes;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(codes) : "f"(0.0f), "f"(x));
  return codes & 0xff;
}

__device__ inline float from_e4m3(uint8_t code) {
  uint32_t half;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(half) : "h"(static_cast<uint16_t>(code)));
  return __low2float(reinterpret_cast<const __half2&>(half));
}

__global__ void fill_e4m3(uint8_t* x, int64_t n, uint32_t seed, float scale) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < n;
       i += int64_t{gridDim.x} * blockDim.x)
    x[i] = to_e4m3(normal(i, seed) * scale);
}

__global__ void fill_bf16(__nv_bfloat16* x, int64_t n, uint32_t seed, float scale) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < n;
       i += int64_t{gridDim.x} * blockDim.x)
    x[i] = normal(i, seed) * scale;
}

__global__ void fill_floats(float* x, int64_t n, uint32_t seed, float mean, float deviation) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < n;
       i += int64_t{gridDim.x} * blockDim.x)
    x[i] = mean + deviation * normal(i, seed);
}

// Keys of blocks, a thread block each. nans: one token in 50 has a NaN code, one a NaN scale, one
// an infinite scale.
__global__ void fill_keys(uint8_t* blocks, const int32_t* ids, int64_t count, uint32_t seed,
                          bool nans) {
  for (int64_t i = blockIdx.x; i < count; i += gridDim.x) {
    const int64_t id = ids == nullptr ? i : ids[i];
    uint8_t* block = blocks + id * kBlockBytes;
    for (int t = threadIdx.x; t < 64 * 128; t += blockDim.x)
      block[t] = to_e4m3(normal(id * 8192 + t, seed) * 100);
    __syncthreads();
    if (threadIdx.x >= 64) continue;
    const int64_t token = id * 64 + threadIdx.x;
    const uint32_t kind = nans ? hash(token, seed + 2) % 50 : 50;
    if (kind == 0)
      block[threadIdx.x * 128 + hash(token, 5) % 128] = hash(token, 6) & 1 ? 0x7f : 0xff;
    float scale = 0.01f * (0.5f + uniform(token, seed + 1));
    if (kind == 1) scale = NAN;
    if (kind == 2) scale = INFINITY;
    reinterpret_cast<float*>(block + 64 * 128)[threadIdx.x] = scale;
  }
}

// A thread a score; magnitude: the sum of all products' magnitudes, weighted.
__global__ void naive_scores(flashmla::IndexScoresParams p, float* scores, float* magnitude) {
  const int64_t tokens = int64_t{p.keys.max_blocks} * 64;
  const int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  if (i >= p.b * p.s_q * tokens) return;
  const int64_t row = i / tokens, token = i % tokens, sequence = row / p.s_q;
  int64_t length = min(max(int64_t{p.keys.cache_seqlens[sequence]}, int64_t{0}), tokens);
  if (p.causal) length -= p.s_q - 1 - row % p.s_q;
  const int64_t id = p.keys.block_table[sequence * p.keys.max_blocks + token / 64];
  scores[i] = -INFINITY;
  magnitude[i] = 0;
  if (token >= length || id < 0 || id >= p.keys.layer_blocks) return;
  const int64_t first = p.keys.first_block == nullptr ? 0 : *p.keys.first_block;
  const int64_t layer = min(max(first, int64_t{0}), p.keys.num_blocks - p.keys.layer_blocks);
  const uint8_t* block = (const uint8_t*)p.keys.blocks + (layer + id) * p.keys.block_bytes;
  const uint8_t* key = block + token % 64 * 128;
  const float scale = ((const float*)(block + 64 * 128))[token % 64];
  double sum = 0, all = 0;
  for (int h = 0; h < p.heads; ++h) {
    float product = 0, products = 0;
    for (int c = 0; c < 128; ++c) {
      const int64_t at = (row * p.heads + h) * 128 + c;
      const float q = p.fp8_queries ? from_e4m3(((const uint8_t*)p.q)[at])
                                    : __bfloat162float(((const __nv_bfloat16*)p.q)[at]);
      product += q * from_e4m3(key[c]);
      products += fabsf(q * from_e4m3(key[c]));
    }
    const float weight = p.weights[row * p.heads + h];
    sum += double{weight} * (product < 0 ? 0.0f : product);
    all += fabs(double{weight}) * products;
  }
  scores[i] = float(sum) * scale;
  magnitude[i] = all * fabsf(scale);
}

// The positions of the topk best of a row, ascending: of equal ones the earlier, never -inf or NaN.
inline std::vector<int> select(const float* scores, int64_t seen, int topk) {
  std::vector<int> found;
  for (int64_t t = 0; t < seen; ++t)
    if (scores[t] > -INFINITY) found.push_back(int(t));
  const auto better = [&](int a, int b) {
    return scores[a] != scores[b] ? scores[a] > scores[b] : a < b;
  };
  if (found.size() > size_t(topk)) {
    std::nth_element(found.begin(), found.begin() + topk, found.end(), better);
    found.resize(topk);
  }
  std::sort(found.begin(), found.end());
  return found;
}
