// Random queries and cache rows of any format, and a naive sparse decode over them in double
// precision: what bench_sparse_decode.cu holds the kernels against.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp8.h>

#include <cstdint>

#include "formats.h"
#include "naive_attend.cuh"
#include "noise.cuh"
#include "params/sparse_decode.h"

using T = __nv_bfloat16;
using flashmla::Format;
using flashmla::FormatLayout;
using flashmla::ScaleType;
using flashmla::SparseDecodeParams;
using flashmla::SparseSource;
constexpr int kDv = 512;

// Where slot `slot` of the array lies in a plane.
__host__ __device__ inline int64_t slot_offset(const SparseSource& m, const FormatLayout& layout,
                                               int plane, int64_t slot) {
  const int64_t block = slot / m.block_size, token = slot % m.block_size;
  return block * m.block_bytes + flashmla::row_offset(layout, plane, m.block_size, token);
}

__device__ float e2m1(int code) {
  constexpr float kValues[] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6};
  return code & 8 ? -kValues[code & 7] : kValues[code & 7];
}

// Writes rows; `slots` null: all of [0, n). spread: scales are 2^(uniform in +-spread), else those
// that quantising would choose.
__global__ void fill_rows(SparseSource m, int d_qk, const int64_t* slots, uint64_t n, uint32_t seed,
                          int spread) {
  const FormatLayout layout = flashmla::layout_of(m.format);
  uint8_t* const blocks = static_cast<uint8_t*>(const_cast<void*>(m.blocks));
  for (uint64_t i = blockIdx.x; i < n; i += gridDim.x) {
    const int64_t slot = slots ? slots[i] : i;
    const int t = threadIdx.x;
    const auto column = [&](int d) {
      return fminf(fmaxf(0.1f * noise(i * 576 + d, seed), -1.f), 1.f);
    };
    if (m.format == Format::kDense) {
      T* row = reinterpret_cast<T*>(blocks + slot / m.block_size * m.block_bytes) +
               slot % m.block_size * m.row_stride;
      for (int d = t; d < d_qk; d += blockDim.x) row[d] = __float2bfloat16(column(d));
      continue;
    }
    uint8_t* row = blocks + slot_offset(m, layout, 0, slot);
    uint8_t* scales =
        blocks + slot_offset(m, layout, layout.scale_plane, slot) + layout.scale_offset;
    for (int g = t; g < layout.codes / layout.group; g += blockDim.x) {
      const int power = int(hash(i * 32 + g, seed + 5) % (2 * spread + 1)) - spread;
      if (layout.scale == ScaleType::kE4M3) {
        scales[g] = __nv_cvt_float_to_fp8(0.03f + 0.01f * power / 100, __NV_SATFINITE, __NV_E4M3);
        for (int j = 0; j < layout.group / 2; ++j)
          row[g * layout.group / 2 + j] = hash(i * 256 + g * layout.group / 2 + j, seed);
        continue;
      }
      float peak = 0;
      for (int j = 0; j < layout.group; ++j)
        peak = fmaxf(peak, fabsf(column(g * layout.group + j)));
      float quantised = exp2f(ceilf(log2f(fmaxf(peak / 448, 1e-4f))));
      if (layout.scale == ScaleType::kCache) quantised = 1;
      for (int j = 0; j < layout.group; ++j) {
        const int d = g * layout.group + j;
        row[d] = __nv_cvt_float_to_fp8(column(d) / quantised, __NV_SATFINITE, __NV_E4M3);
      }
      const float scale = spread ? exp2f(float(power)) : quantised;
      if (layout.scale == ScaleType::kFloat32) reinterpret_cast<float*>(scales)[g] = scale;
      if (layout.scale == ScaleType::kE8M0) scales[g] = uint8_t(ilogbf(scale) + 127);
    }
    for (int d = layout.codes + t; d < d_qk; d += blockDim.x)
      reinterpret_cast<T*>(row + layout.rope_offset)[d - layout.codes] =
          __float2bfloat16(column(d));
  }
}

__device__ float dequantise(const SparseSource& m, int64_t slot, int d) {
  const uint8_t* blocks = static_cast<const uint8_t*>(m.blocks);
  if (m.format == Format::kDense) {
    const T* rows = reinterpret_cast<const T*>(blocks + slot / m.block_size * m.block_bytes);
    return __bfloat162float(rows[slot % m.block_size * m.row_stride + d]);
  }
  const FormatLayout layout = flashmla::layout_of(m.format);
  const uint8_t* row = blocks + slot_offset(m, layout, 0, slot);
  if (d >= layout.codes)
    return __bfloat162float(reinterpret_cast<const T*>(row + layout.rope_offset)[d - layout.codes]);
  const uint8_t* scales =
      blocks + slot_offset(m, layout, layout.scale_plane, slot) + layout.scale_offset;
  const int g = d / layout.group;
  const auto from_e4m3 = [](uint8_t code) {
    return __half2float(__half(__nv_cvt_fp8_to_halfraw(code, __NV_E4M3)));
  };
  float scale = 1;
  if (layout.scale == ScaleType::kFloat32) scale = reinterpret_cast<const float*>(scales)[g];
  if (layout.scale == ScaleType::kE8M0) scale = exp2f(float(scales[g]) - 127);
  if (layout.scale == ScaleType::kE4M3) scale = from_e4m3(scales[g]);
  const float code =
      layout.scale == ScaleType::kE4M3 ? e2m1(row[d / 2] >> d % 2 * 4 & 15) : from_e4m3(row[d]);
  return __bfloat162float(__hmul(__float2bfloat16(code), __float2bfloat16(scale)));
}

__device__ int source_length(const SparseSource& m, int query) {
  return m.topk_length ? min(max(m.topk_length[query], 0), m.topk) : m.topk;
}

// One thread block a query row; scores in global memory.
__global__ void naive(SparseDecodeParams p, double* scores, float* out, float* lse) {
  const int row = blockIdx.x, query = row / p.h_q, head = row % p.h_q;
  const bool has_extra = p.extra.blocks != nullptr;
  const int main = source_length(p.main, query);
  const int length = main + (has_extra ? source_length(p.extra, query) : 0);
  const T* q = static_cast<const T*>(p.q) + int64_t(row) * p.d_qk;
  const double factor = p.main.format == Format::kFp8Row ? *p.kv_scale : 1.0;
  double* s = scores + int64_t(row) * (p.main.topk + p.extra.topk);
  const auto source = [&](int t) -> const SparseSource& { return t < main ? p.main : p.extra; };
  const auto find = [&](int t) -> int64_t {  // -1: not attended
    const SparseSource& m = source(t);
    const int64_t slot = m.indices[int64_t(query) * m.topk + (t < main ? t : t - main)];
    if (slot < 0 || slot >= m.layer_blocks * m.block_size) return -1;
    return slot + (m.first_block ? int64_t{*m.first_block} * m.block_size : 0);
  };
  const auto score = [&](int t) {
    const int64_t slot = find(t);
    double dot = 0;
    for (int d = 0; slot >= 0 && d < p.d_qk; ++d)
      dot += double(__bfloat162float(q[d])) * dequantise(source(t), slot, d);
    return slot >= 0 ? dot * factor * p.sm_scale : -INFINITY;
  };
  const auto value = [&](int t, int d) { return factor * dequantise(source(t), find(t), d); };
  const float* sink = p.attn_sink ? p.attn_sink + head : nullptr;
  naive_attend(length, kDv, s, score, value, sink, out + int64_t(row) * kDv, lse + row);
}
