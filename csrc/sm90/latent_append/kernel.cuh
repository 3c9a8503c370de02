// latent_append: a thread block norms, rotates and stores one token's cache row, and another one
// norms its query latent. What a token needs from memory is asked for before the first sum, as each
// of its arrays is cold in every layer.
#pragma once

#include <cstdint>

#include "append_slot.h"
#include "elements.h"
#include "params/latent_append.h"
#include "sm90/formats/quantise.cuh"
#include "sm90/ptx/barrier.cuh"

namespace flashmla::sm90::latent_append {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kWidth = 4;  // neighbouring columns of a thread

__device__ __forceinline__ void prefetch(const void* address) {
  asm volatile("prefetch.global.L1 [%0];" ::"l"(address));
}

__device__ __forceinline__ const void* address_of(const void* array, DType dtype, int i) {
  return static_cast<const char*>(array) + int64_t{i} * (dtype == DType::kFloat32 ? 4 : 2);
}

__device__ __forceinline__ void prefetch_weight(const void* weight, DType dtype, int n) {
  const int step = dtype == DType::kFloat32 ? 32 : 64;  // 128 bytes
  for (int i = threadIdx.x * step; i < n; i += kThreads * step) {
    prefetch(address_of(weight, dtype, i));
  }
}

__device__ __forceinline__ float load_weight(const void* weight, DType dtype, int i) {
  const void* at = address_of(weight, dtype, i);
  if (dtype == DType::kBFloat16) return BFloat16::to_float(*static_cast<const BFloat16*>(at));
  if (dtype == DType::kFloat16) return Float16::to_float(*static_cast<const Float16*>(at));
  return *static_cast<const float*>(at);
}

template <class Element>
__device__ __forceinline__ float round_to(float x) {
  return Element::to_float(Element::from_float(x));
}

// Columns [column, column + kWidth) of a row of n, 0 past its end; `whole` where they lie aligned
// and within it.
template <class Element>
__device__ __forceinline__ void load_columns(const Element* row, int column, int n, bool whole,
                                             float (&x)[kWidth]) {
  if (whole) {
    const auto from = *reinterpret_cast<const Columns<Element>*>(row + column);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) x[i] = Element::to_float(from.x[i]);
    return;
  }
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    x[i] = column + i < n ? Element::to_float(row[column + i]) : 0.0f;
  }
}

// The sum over the block's threads, in each of them; `sums` is shared.
__device__ __forceinline__ float sum_over_block(float x, float (&sums)[kWarps]) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffff, x, offset);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = x;
  __syncthreads();
  float sum = 0.0f;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) sum += sums[warp];
  return sum;
}

// put(i, value) for each of n columns, over their root mean square, times weight.
template <class Element, class Put>
__device__ __forceinline__ void rms_norm(const Element* row, int n, bool whole, const void* weight,
                                         DType weight_dtype, float eps, float scale,
                                         float (&sums)[kWarps], const Put& put) {
  const int first = static_cast<int>(threadIdx.x) * kWidth;
  float sum = 0.0f;
  for (int column = first; column < n; column += kThreads * kWidth) {
    float x[kWidth];
    load_columns(row, column, n, whole, x);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) sum += x[i] * x[i];
  }
  sum = sum_over_block(sum, sums);
  const float inverse = rsqrtf(sum / static_cast<float>(n) + eps);
  for (int column = first; column < n; column += kThreads * kWidth) {
    float x[kWidth];
    load_columns(row, column, n, whole, x);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      if (column + i >= n) break;
      put(column + i, x[i] * inverse * (load_weight(weight, weight_dtype, column + i) * scale));
    }
  }
}

// The rotary key [rope] to `turned`, which is shared.
template <class Element, class Stored>
__device__ __forceinline__ void turn_key(const LatentAppendParams& params, const Element* key,
                                         int64_t row, Stored* turned) {
  if (params.layout == RopeLayout::kNone) {
    for (int i = threadIdx.x; i < params.rope; i += kThreads) {
      turned[i] = Stored::from_float(Element::to_float(key[i]));
    }
    return;
  }
  const int pairs = params.rope / 2;
  for (int pair = threadIdx.x; pair < pairs; pair += kThreads) {
    const RopePair at = rope_pair(params.layout, pair, pairs);
    const float cos = params.cos[row * pairs + pair], sin = params.sin[row * pairs + pair];
    const float x = Element::to_float(key[at.from[0]]), y = Element::to_float(key[at.from[1]]);
    turned[at.to[0]] = Stored::from_float(round_to<Element>(x * cos - y * sin));
    turned[at.to[1]] = Stored::from_float(round_to<Element>(y * cos + x * sin));
  }
}

template <typename Word>
__device__ __forceinline__ void copy_words(const void* from, void* to, int bytes) {
  const int words = bytes / static_cast<int>(sizeof(Word));
  for (int i = threadIdx.x; i < words; i += kThreads) {
    static_cast<Word*>(to)[i] = static_cast<const Word*>(from)[i];
  }
}

// row [d], which is shared, to its slot.
template <class Stored>
__device__ __forceinline__ void store_row(const CacheAppendParams& cache,
                                          const FormatLayout& layout, const Stored* row,
                                          AppendSlot slot) {
  char* block = static_cast<char*>(cache.updated) + slot.block * cache.block_bytes;
  if (cache.format == Format::kDense) {
    const int bytes = cache.d * static_cast<int>(sizeof(Stored));
    const int64_t stride = cache.row_stride * static_cast<int64_t>(sizeof(Stored));
    char* to = block + slot.token * stride;
    if ((bytes | stride) % sizeof(uint4) == 0) {
      copy_words<uint4>(row, to, bytes);
    } else {
      copy_words<uint16_t>(row, to, bytes);
    }
    return;
  }
  auto* codes = reinterpret_cast<uint8_t*>(block);
  uint8_t* scales = codes + layout.scale_offset +
                    row_offset(layout, layout.scale_plane, cache.block_size, slot.token);
  const float kv_scale = layout.scale == ScaleType::kCache ? *cache.kv_scale : 1.0f;
  quantise_row(layout, row, kv_scale, codes + row_offset(layout, 0, cache.block_size, slot.token),
               scales, cache.format == Format::kV4);
}

// grid [b * s_new, 2 or, without a query latent, 1].
template <class Element, class Stored>
__global__ void __launch_bounds__(kThreads)
    latent_append_kernel(LatentAppendParams params, FormatLayout layout, bool whole) {
  extern __shared__ uint4 shared[];
  __shared__ float sums[kWarps];
  const CacheAppendParams& cache = params.cache;
  const int64_t row = blockIdx.x;
  launch_dependents();
  prefetch_weight(blockIdx.y == 1 ? params.q_norm : params.kv_norm, params.norm_dtype,
                  blockIdx.y == 1 ? params.q_rank : params.kv_rank);
  wait_for_prerequisites();
  const Element* from = static_cast<const Element*>(params.projected) + row * params.columns;
  if (blockIdx.y == 1) {
    Element* to = static_cast<Element*>(params.q_latent) + row * params.q_rank;
    rms_norm(from, params.q_rank, whole, params.q_norm, params.norm_dtype, params.q_eps, 1.0f, sums,
             [&](int i, float x) { to[i] = Element::from_float(x); });
    return;
  }
  const AppendSlot slot = find_slot(cache, row / cache.s_new, row % cache.s_new);
  if (slot.block < 0) return;
  Stored* made = reinterpret_cast<Stored*>(shared);
  from += params.q_rank;
  turn_key(params, from + params.kv_rank, row, made + params.kv_rank);
  rms_norm(from, params.kv_rank, whole, params.kv_norm, params.norm_dtype, params.kv_eps,
           params.latent_scale, sums,
           [&](int i, float x) { made[i] = Stored::from_float(round_to<Element>(x)); });
  __syncthreads();
  store_row(cache, layout, made, slot);
}

}  // namespace flashmla::sm90::latent_append
