#include "sm90/cache_append/launch.h"

#include <algorithm>
#include <cstdint>

#include "append_slot.h"
#include "sm90/formats/quantise.cuh"
#include "sm90/host/copy_blocks.h"
#include "sm90/host/launch.h"

namespace flashmla::sm90 {
namespace {

constexpr int kThreads = 128;

__device__ __forceinline__ AppendSlot slot_of_row(const CacheAppendParams& params, int64_t row) {
  return find_slot(params, row / params.s_new, row % params.s_new);
}

// One block a row at a time; Word is the widest type that divides a head's row and, where rows are
// wider than that (kPadded), the stride between them.
template <typename Word, bool kPadded>
__global__ void __launch_bounds__(kThreads)
    cache_append_kernel(CacheAppendParams params, int words, int head_words, int head_stride) {
  const int64_t num_rows = int64_t{params.b} * params.s_new;
  const int64_t token_words = kPadded ? int64_t{params.h_kv} * head_stride : words;
  for (int64_t row = blockIdx.x; row < num_rows; row += gridDim.x) {
    const AppendSlot slot = slot_of_row(params, row);
    if (slot.block < 0) continue;
    const Word* source = static_cast<const Word*>(params.rows) + row * words;
    Word* target = static_cast<Word*>(params.updated) +
                   (slot.block * params.block_size + slot.token) * token_words;
    for (int i = threadIdx.x; i < words; i += kThreads) {
      const int64_t to = kPadded ? int64_t{i / head_words} * head_stride + i % head_words : i;
      target[to] = source[i];
    }
  }
}

// One block a row at a time, into any format but the dense one.
template <class Element>
__global__ void __launch_bounds__(kThreads)
    cache_append_quantised_kernel(CacheAppendParams params, FormatLayout layout) {
  const int64_t num_rows = int64_t{params.b} * params.s_new;
  const float kv_scale = layout.scale == ScaleType::kCache ? *params.kv_scale : 1.0f;
  for (int64_t row = blockIdx.x; row < num_rows; row += gridDim.x) {
    const AppendSlot slot = slot_of_row(params, row);
    if (slot.block < 0) continue;
    auto* block = static_cast<uint8_t*>(params.updated) + slot.block * params.block_bytes;
    uint8_t* scales = block + layout.scale_offset +
                      row_offset(layout, layout.scale_plane, params.block_size, slot.token);
    quantise_row(layout, static_cast<const Element*>(params.rows) + row * params.d, kv_scale,
                 block + row_offset(layout, 0, params.block_size, slot.token), scales,
                 params.format == Format::kV4);
  }
}

unsigned grid_of(const CacheAppendParams& params) {
  return static_cast<unsigned>(std::min<int64_t>(int64_t{params.b} * params.s_new, 1 << 20));
}

template <typename Word>
Status launch_copy(const CacheAppendParams& params, cudaStream_t stream) {
  const auto to_words = [&](int64_t elements) {
    return static_cast<int>(elements * itemsize(params.rows_dtype) / sizeof(Word));
  };
  const auto kernel = params.row_stride == params.d ? cache_append_kernel<Word, false>
                                                    : cache_append_kernel<Word, true>;
  return launch(kernel, {grid_of(params), kThreads}, stream, "cache_append", params,
                to_words(int64_t{params.h_kv} * params.d), to_words(params.d),
                to_words(params.row_stride));
}

template <class Element>
Status launch_quantise(const CacheAppendParams& params, cudaStream_t stream) {
  return launch(cache_append_quantised_kernel<Element>, {grid_of(params), kThreads}, stream,
                "cache_append", params, layout_of(params.format));
}

}  // namespace

Status run_cache_append(const CacheAppendParams& params, cudaStream_t stream) {
  const Status copied = copy_blocks(params, stream, "cache_append");
  if (!copied.ok()) return copied;
  if (int64_t{params.b} * params.s_new == 0 || params.d == 0) return Status::Ok();
  if (params.format != Format::kDense) {
    switch (params.rows_dtype) {
      case DType::kBFloat16:
        return launch_quantise<BFloat16>(params, stream);
      case DType::kFloat16:
        return launch_quantise<Float16>(params, stream);
      case DType::kFloat32:
        return launch_quantise<Float32>(params, stream);
    }
  }
  // Bytes that must be whole words: a token's row, or each head's row and the stride.
  const int64_t item = itemsize(params.rows_dtype);
  const bool padded = params.row_stride != params.d;
  const int64_t bytes =
      padded ? (params.d | params.row_stride) * item : int64_t{params.h_kv} * params.d * item;
  if (bytes % sizeof(uint4) == 0) return launch_copy<uint4>(params, stream);
  if (bytes % sizeof(uint32_t) == 0) return launch_copy<uint32_t>(params, stream);
  return launch_copy<uint16_t>(params, stream);
}

}  // namespace flashmla::sm90
