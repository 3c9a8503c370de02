// Random queries and rows of v32 and fp8_row caches, and a naive dense decode over them in double
// precision: what bench_dense_fp8.cu holds the kernel against.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp8.h>

#include <cstdint>

#include "naive_attend.cuh"
#include "noise.cuh"
#include "params/dense_decode.h"

using T = __nv_bfloat16;
using flashmla::DenseDecodeParams;
using flashmla::Format;
constexpr int kDqk = 576, kDv = 512, kGroup = 128;

__host__ __device__ constexpr int row_bytes(Format format) {
  return format == Format::kV32 ? 656 : format == Format::kFp8Row ? 576 : 1152;
}

// Rows of any of the three formats, a thread block each. spread: of v32's scales, which are
// 2^(uniform in +-spread), else 2^-10.
__global__ void fill_rows(uint8_t* pool, Format format, uint64_t n, uint32_t seed, int spread) {
  for (uint64_t i = blockIdx.x; i < n; i += gridDim.x) {
    uint8_t* row = pool + i * row_bytes(format);
    for (int d = threadIdx.x; d < kDqk; d += blockDim.x) {
      const float x = 0.1f * noise(i * kDqk + d, seed);
      const bool coded = format == Format::kFp8Row || (format == Format::kV32 && d < kDv);
      if (coded) {
        row[d] = __nv_cvt_float_to_fp8(x * 1024, __NV_SATFINITE, __NV_E4M3);
      } else {
        const int first = format == Format::kV32 ? 528 - 2 * kDv : 0;
        *reinterpret_cast<T*>(row + first + 2 * d) = __float2bfloat16(x);
      }
    }
    if (format == Format::kV32 && threadIdx.x < 4) {
      const int power = int(hash(i * 4 + threadIdx.x, seed + 5) % (2 * spread + 1)) - spread;
      reinterpret_cast<float*>(row + kDv)[threadIdx.x] = exp2f(spread ? float(power) : -10.0f);
    }
  }
}

__device__ double dequantise(const uint8_t* row, Format format, float kv_scale, int d) {
  if (format == Format::kDense) return __bfloat162float(reinterpret_cast<const T*>(row)[d]);
  if (format == Format::kV32 && d >= kDv)
    return __bfloat162float(reinterpret_cast<const T*>(row + 528)[d - kDv]);
  const double code = __half2float(__half(__nv_cvt_fp8_to_halfraw(row[d], __NV_E4M3)));
  if (format == Format::kFp8Row) return code * kv_scale;
  return code * reinterpret_cast<const float*>(row + kDv)[d / kGroup];
}

// One thread block a query row; scores in global memory.
__global__ void naive(DenseDecodeParams p, double* scores, int max_tokens, float* out, float* lse) {
  const int row = blockIdx.x, rows = p.s_q * p.h_q, sequence = row / rows;
  const int query = row % rows / p.h_q;
  const int cached = min(max(p.cache_seqlens[sequence], 0), p.max_blocks * p.block_size);
  const int length = max(0, cached - (p.causal ? p.s_q - 1 - query : 0));
  const float kv_scale = p.kv_scale ? *p.kv_scale : 1;
  const T* q = static_cast<const T*>(p.q) + int64_t(row) * kDqk;
  double* s = scores + int64_t(row) * max_tokens;
  auto key = [&](int t) -> const uint8_t* {
    const int64_t block = p.block_table[int64_t(sequence) * p.max_blocks + t / p.block_size];
    if (block < 0 || block >= p.num_blocks) return nullptr;  // reads as zeros
    return static_cast<const uint8_t*>(p.blocks) + block * p.block_bytes +
           int64_t(t % p.block_size) * row_bytes(p.format);
  };
  const auto score = [&](int t) {
    const uint8_t* k = key(t);
    double dot = 0;
    for (int d = 0; k && d < kDqk; ++d)
      dot += double(__bfloat162float(q[d])) * dequantise(k, p.format, kv_scale, d);
    return dot * p.sm_scale;
  };
  const auto value = [&](int t, int d) {
    const uint8_t* k = key(t);
    return k ? dequantise(k, p.format, kv_scale, d) : 0;
  };
  naive_attend(length, kDv, s, score, value, nullptr, out + int64_t(row) * kDv, lse + row);
}
