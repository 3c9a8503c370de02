// project's float32 weight: a thread block makes 32 columns for 32 rows, its warps and a cluster of
// blocks share the sum over k. A float32 number is the sum of three of bfloat16, whose products
// with bfloat16 are exact in float32: three products on the tensor cores are one that rounds
// nothing but its sums. A float16 number of x is the sum of two.
#pragma once

#include <cstdint>
#include <type_traits>

#include "elements.h"
#include "params/project.h"
#include "sm90/ptx/barrier.cuh"
#include "sm90/ptx/cluster.cuh"
#include "sm90/ptx/matrix.cuh"
#include "sm90/ptx/mma.cuh"
#include "sm90/ptx/smem_desc.cuh"

namespace flashmla::sm90::project::exact {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kSplits = 8;             // thread blocks of a cluster
constexpr int kColumns = 32;           // of the weight, four a lane
constexpr int kRows = 32;              // of x
constexpr int kDepth = 16;             // of k in a step
constexpr int kStride = kColumns + 4;  // floats between rows of the sums: banks apart
constexpr int kBuffers = 3;            // steps of a warp on their way
constexpr int kParts = 3;              // bfloat16 numbers that a float32 number is the sum of
constexpr int kPieces = kColumns / 4;  // float4 of a row

// The next bfloat16 parts of a and b, side by side; they are taken from both.
__device__ __forceinline__ uint32_t split(float& a, float& b) {
  const uint32_t parts = pack<__nv_bfloat16>(a, b);
  a -= __uint_as_float(parts << 16);
  b -= __uint_as_float(parts & 0xffff0000);
  return parts;
}

// A lane's operands of a step: lane 4 g + t has rows 4 t to 4 t + 3 of weights, columns 4 g to 4 g
// + 3 of each, and as many elements of rows g, g + 8, ... of x. Which of k's elements an
// instruction takes for which does not matter, as both are taken the same way.
struct Operands {
  float4 w[4];
  uint2 x[kRows / 8];
};

struct Place {
  const char *w, *x;
  int w_stride;      // bytes between rows of weights
  int64_t x_stride;  // between 8 rows of x
  int rows, depth;   // of x, and of k, from this lane's first ones on
  bool valid;        // whether this lane's columns are there

  __device__ __forceinline__ void load(int step, Operands& to) const {
    const bool within = step * kDepth < depth;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      to.w[i] = {};
      if (valid && within) {
        to.w[i] =
            __ldg(reinterpret_cast<const float4*>(w + (int64_t{step} * kDepth + i) * w_stride));
      }
    }
#pragma unroll
    for (int r = 0; r < kRows / 8; ++r) {
      to.x[r] = {};
      if (8 * r < rows && within) {
        to.x[r] = __ldg(reinterpret_cast<const uint2*>(x + step * kDepth * 2 + r * x_stride));
      }
    }
  }
};

// d[r][j]: of columns 4 g + 2 j and 4 g + 2 j + 1, and rows 8 r + 2 t and 8 r + 2 t + 1.
template <class Element>
__device__ __forceinline__ void multiply(const Operands& from, float (&d)[kRows / 8][2][4]) {
  constexpr bool kHalf = std::is_same_v<Element, Float16>;
  constexpr int kParted = kHalf ? 2 : 1;
  uint2 x[kParted][kRows / 8];
#pragma unroll
  for (int r = 0; r < kRows / 8; ++r) {
    if constexpr (kHalf) {
      const auto* values = reinterpret_cast<const Element*>(&from.x[r]);
      float v[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) v[i] = Element::to_float(values[i]);
#pragma unroll
      for (int part = 0; part < kParted; ++part)
        x[part][r] = {split(v[0], v[1]), split(v[2], v[3])};
    } else {
      x[0][r] = from.x[r];
    }
  }
  float w[4][4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    w[i][0] = from.w[i].x, w[i][1] = from.w[i].y, w[i][2] = from.w[i].z, w[i][3] = from.w[i].w;
  }
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const uint32_t a[4] = {
          split(w[0][2 * j], w[1][2 * j]), split(w[0][2 * j + 1], w[1][2 * j + 1]),
          split(w[2][2 * j], w[3][2 * j]), split(w[2][2 * j + 1], w[3][2 * j + 1])};
#pragma unroll
      for (int r = 0; r < kRows / 8; ++r) {
#pragma unroll
        for (int of_x = 0; of_x < kParted; ++of_x) {
          mma_16816<__nv_bfloat16>(d[r][j], a, x[of_x][r].x, x[of_x][r].y);
        }
      }
    }
  }
}

// grid [kSplits, columns / 32, groups * rows / 32], clusters of kSplits. It may run beside the
// kernel before it, which makes the other columns: a third of the registers are left to that.
template <class Element>
__global__ void __launch_bounds__(kThreads, 1)
    project_exact_kernel(const __grid_constant__ ProjectParams params) {
  __shared__ __align__(16) float sums[kWarps][kRows * kStride];
  launch_dependents();
  const int rank = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row_tiles = (params.rows + kRows - 1) / kRows;
  const int group = static_cast<int>(blockIdx.z) / row_tiles;
  const int row0 = static_cast<int>(blockIdx.z) % row_tiles * kRows;
  const int column0 = static_cast<int>(blockIdx.y) * kColumns, n = params.exact_n;
  const int g = lane / 4, t = lane % 4;
  const int64_t x_row = int64_t{params.groups} * (params.k + params.rope);
  const Place place = {
      reinterpret_cast<const char*>(params.exact_w + (int64_t{group} * params.k + 4 * t) * n +
                                    column0 + 4 * g),
      static_cast<const char*>(params.x) +
          ((row0 + g) * x_row + int64_t{group} * (params.k + params.rope) + 4 * t) * 2,
      n * 4,
      8 * x_row * 2,
      params.rows - row0 - g,
      params.k - 4 * t,
      column0 + 4 * g < n};
  float d[kRows / 8][2][4] = {};
  Operands operands[kBuffers];
  const int steps = (params.k + kDepth - 1) / kDepth, stride = kSplits * kWarps;
  int step = rank * kWarps + warp;
#pragma unroll
  for (int i = 0; i < kBuffers; ++i) {
    if (step + i * stride < steps) place.load(step + i * stride, operands[i]);
  }
#pragma unroll 1
  while (step < steps) {
#pragma unroll
    for (int i = 0; i < kBuffers; ++i) {
      if (step >= steps) break;
      multiply<Element>(operands[i], d);
      if (step + kBuffers * stride < steps) place.load(step + kBuffers * stride, operands[i]);
      step += stride;
    }
  }
#pragma unroll
  for (int r = 0; r < kRows / 8; ++r) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      *reinterpret_cast<float4*>(&sums[warp][(8 * r + 2 * t + i) * kStride + 4 * g]) = {
          d[r][0][i], d[r][0][2 + i], d[r][1][i], d[r][1][2 + i]};
    }
  }
  __syncthreads();
  // Over the block's warps, to the first one's place; then over the cluster's blocks. In order.
  static_assert(kThreads == kRows * kPieces);
  const int at = static_cast<int>(threadIdx.x) / kPieces * kStride + threadIdx.x % kPieces * 4;
  float4 sum = {};
#pragma unroll
  for (int i = 0; i < kWarps; ++i) {
    const float4 v = *reinterpret_cast<const float4*>(&sums[i][at]);
    sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
  }
  *reinterpret_cast<float4*>(&sums[0][at]) = sum;
  cluster_sync();
  constexpr int kOwn = kRows * kPieces / kSplits;
  const int piece = rank * kOwn + threadIdx.x, row = row0 + piece / kPieces;
  const int column = column0 + piece % kPieces * 4;
  if (threadIdx.x < kOwn && row < params.rows && column < n) {
    const uint32_t from = smem_address(&sums[0][piece / kPieces * kStride + piece % kPieces * 4]);
    float4 parts[kSplits];
#pragma unroll
    for (int i = 0; i < kSplits; ++i) parts[i] = load_cluster_float4(map_shared(from, i));
    float4 total = {};
#pragma unroll
    for (const float4& v : parts) {
      total.x += v.x, total.y += v.y, total.z += v.z, total.w += v.w;
    }
    float* y = params.exact_y + (int64_t{row} * params.groups + group) * n + column;
    *reinterpret_cast<float4*>(y) = total;
  }
  cluster_sync();            // no block leaves while another one reads its sums
  wait_for_prerequisites();  // what follows this kernel takes the one before it for ended, too
}

}  // namespace flashmla::sm90::project::exact
