// index_append: a warp takes a row of 128 columns, four neighbouring ones a lane: one head's index
// query, or a token's index key. It stays in registers but for the rotation, whose pairs may lie in
// different lanes.
#pragma once

#include <cstdint>

#include "append_slot.h"
#include "elements.h"
#include "params/index_append.h"
#include "sm90/formats/quantise.cuh"
#include "sm90/ptx/barrier.cuh"

namespace flashmla::sm90::index_append {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kWidth = kIndexColumns / 32;  // columns of a lane
static_assert(kWidth == kQuantisedColumns);

using Shared = float[kIndexColumns];  // a warp's row

template <class Element>
__device__ __forceinline__ float round_to(float x) {
  return Element::to_float(Element::from_float(x));
}

__device__ __forceinline__ float sum_over_warp(float x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffff, x, offset);
  return x;
}

// The lane's columns of a row; `whole` where they lie aligned.
template <class Element>
__device__ __forceinline__ void load_columns(const void* rows, int64_t begin, int lane, bool whole,
                                             float (&x)[kWidth]) {
  const Element* from = static_cast<const Element*>(rows) + begin + lane * kWidth;
  Columns<Element> columns;
  if (whole) {
    columns = *reinterpret_cast<const Columns<Element>*>(from);
  } else {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) columns.x[i] = from[i];
  }
#pragma unroll
  for (int i = 0; i < kWidth; ++i) x[i] = Element::to_float(columns.x[i]);
}

__device__ __forceinline__ void load_weights(const void* weights, DType dtype, int lane,
                                             float (&x)[kWidth]) {
  if (dtype == DType::kBFloat16) return load_columns<BFloat16>(weights, 0, lane, true, x);
  if (dtype == DType::kFloat16) return load_columns<Float16>(weights, 0, lane, true, x);
  load_columns<Float32>(weights, 0, lane, true, x);
}

// LayerNorm.
template <class Element>
__device__ __forceinline__ void norm_row(const IndexAppendParams& params, int lane,
                                         float (&x)[kWidth]) {
  float weight[kWidth], bias[kWidth];
  load_weights(params.k_norm, params.norm_dtype, lane, weight);
  load_weights(params.k_bias, params.norm_dtype, lane, bias);
  const float mean = sum_over_warp((x[0] + x[1]) + (x[2] + x[3])) / kIndexColumns;
  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    x[i] -= mean;
    squares += x[i] * x[i];
  }
  const float inverse = rsqrtf(sum_over_warp(squares) / kIndexColumns + params.eps);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) x[i] = round_to<Element>(x[i] * inverse * weight[i] + bias[i]);
}

// The rotary embedding of the first columns.
template <class Element>
__device__ __forceinline__ void turn_row(const IndexAppendParams& params, int64_t token, int lane,
                                         Shared& row, float (&x)[kWidth]) {
  const int pairs = params.pairs;
  if (lane * kWidth < 2 * pairs) {
    *reinterpret_cast<float4*>(row + lane * kWidth) = make_float4(x[0], x[1], x[2], x[3]);
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    const int column = lane * kWidth + i;
    if (column >= 2 * pairs) break;
    const RopeColumn at = rope_column(params.layout, column, pairs);
    const RopePair pair = rope_pair(params.layout, at.pair, pairs);
    const float cos = params.cos[token * pairs + at.pair];
    const float sin = params.sin[token * pairs + at.pair];
    const float first = row[pair.from[0]], second = row[pair.from[1]];
    x[i] = round_to<Element>(at.second ? second * cos + first * sin : first * cos - second * sin);
  }
}

// The product with a Hadamard matrix: sums and differences of columns half apart, of which 1 and 2
// lie in a lane.
template <class Element>
__device__ __forceinline__ void spread_row(int lane, float (&x)[kWidth]) {
  const float sums[] = {x[0] + x[1], x[2] + x[3]}, differences[] = {x[0] - x[1], x[2] - x[3]};
  x[0] = sums[0] + sums[1];
  x[1] = differences[0] + differences[1];
  x[2] = sums[0] - sums[1];
  x[3] = differences[0] - differences[1];
#pragma unroll
  for (int half = 1; half < 32; half *= 2) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const float other = __shfl_xor_sync(0xffffffff, x[i], half);
      x[i] = lane & half ? other - x[i] : x[i] + other;
    }
  }
#pragma unroll
  for (int i = 0; i < kWidth; ++i) x[i] = round_to<Element>(x[i] * kHadamardScale);
}

// The row's codes, and their scale in every lane.
template <class Element>
__device__ __forceinline__ GroupScale quantise_row(const float (&x)[kWidth], int lane,
                                                   uint8_t* codes) {
  constexpr FormatLayout layout = layout_of(Format::kFp8Index);
  float finite[kWidth];
  uint32_t amax = 0;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    finite[i] = load_finite(Element::from_float(x[i]));
    amax = max(amax, amax_bits(layout, finite[i]));
  }
  const GroupScale scale = group_scale(layout, reduce_amax(amax, 32), 1.0f);
  uint8_t code[kWidth];
#pragma unroll
  for (int i = 0; i < kWidth; ++i) code[i] = encode(layout, scale, finite[i]);
  store_codes(layout, codes, lane * kWidth, code);
  return scale;
}

// grid [b * s_new, (1 + heads) / kWarps]. A token's first warp has its key, which waits for more.
template <class Element>
__global__ void __launch_bounds__(kThreads)
    index_append_kernel(IndexAppendParams params, bool whole) {
  __shared__ alignas(16) Shared rows[kWarps];
  launch_dependents();
  const CacheAppendParams& cache = params.cache;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int head = static_cast<int>(blockIdx.y) * kWarps + warp - 1;
  const int64_t token = blockIdx.x;
  if (head >= params.heads) return;
  float x[kWidth];
  if (head < 0) {
    load_columns<Element>(params.projected, (token + 1) * params.columns - kIndexColumns, lane,
                          whole, x);
    const AppendSlot slot = find_slot(cache, token / cache.s_new, token % cache.s_new);
    if (slot.block < 0) return;
    norm_row<Element>(params, lane, x);
    turn_row<Element>(params, token, lane, rows[warp], x);
    if (params.hadamard) spread_row<Element>(lane, x);
    constexpr FormatLayout layout = layout_of(Format::kFp8Index);
    auto* block = static_cast<uint8_t*>(cache.updated) + slot.block * cache.block_bytes;
    const GroupScale scale =
        quantise_row<Element>(x, lane, block + row_offset(layout, 0, cache.block_size, slot.token));
    if (lane == 0) {
      store_scale(layout, block + row_offset(layout, 1, cache.block_size, slot.token), 0,
                  scale.bits);
    }
    return;
  }
  const int64_t row = token * params.heads + head;
  load_columns<Element>(params.q, row * kIndexColumns, lane, true, x);
  const float weight = params.weights[row] * params.weight_scale;
  turn_row<Element>(params, token, lane, rows[warp], x);
  if (params.hadamard) spread_row<Element>(lane, x);
  const GroupScale scale = quantise_row<Element>(x, lane, params.codes + row * kIndexColumns);
  if (lane == 0) params.scaled[row] = weight * scale.scale;
}

}  // namespace flashmla::sm90::index_append
