// Random numbers from places: the same on every run, whatever the grid.
#pragma once

#include <cstdint>

__device__ inline uint64_t hash(uint64_t i, uint32_t seed) {
  uint64_t x = i * 0x9E3779B97F4A7C15ull + seed;
  for (int r = 0; r < 2; ++r)
    x ^= x >> 31, x *= 0xBF58476D1CE4E5B9ull, x ^= x >> 27, x *= 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

// Roughly normal: mean 0, variance 1.
__device__ inline float noise(uint64_t i, uint32_t seed) {
  float sum = 0;
  for (int r = 0; r < 2; ++r) {
    const uint64_t x = hash(2 * i + r, seed);
    sum += float(uint32_t(x)) + float(uint32_t(x >> 32));
  }
  return (sum * 0x1p-32f - 2.0f) * 1.7320508f;
}

template <typename T>
__global__ void fill_normal(T* p, uint64_t n, uint32_t seed, float scale) {
  for (uint64_t i = blockIdx.x * uint64_t(blockDim.x) + threadIdx.x; i < n;
       i += gridDim.x * uint64_t(blockDim.x))
    p[i] = T(scale * noise(i, seed));
}
