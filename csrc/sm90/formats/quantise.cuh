// A thread block stores one token's row in a format, four columns a thread at a time.
#pragma once

#include <cstdint>

#include "elements.h"
#include "formats.h"
#include "quantise.h"

namespace flashmla::sm90 {

constexpr int kQuantisedColumns = 4;  // of a thread: a load of 8 or 16 bytes, a store of 2 to 8

template <class Element>
struct alignas(kQuantisedColumns * sizeof(Element)) Columns {
  Element x[kQuantisedColumns];
};

// The larger of a group's amax, in each of its threads. Groups lie side by side in a warp.
__device__ __forceinline__ uint32_t reduce_amax(uint32_t amax, int threads) {
  for (int offset = threads / 2; offset > 0; offset /= 2) {
    amax = max(amax, __shfl_xor_sync(0xffffffff, amax, offset));
  }
  return amax;
}

__device__ __forceinline__ void store_codes(const FormatLayout& layout, uint8_t* codes, int column,
                                            const uint8_t (&code)[kQuantisedColumns]) {
  if (layout.scale == ScaleType::kE4M3) {
    *reinterpret_cast<uchar2*>(codes + column / 2) =
        make_uchar2(code[0] | code[1] << 4, code[2] | code[3] << 4);
  } else {
    *reinterpret_cast<uchar4*>(codes + column) = make_uchar4(code[0], code[1], code[2], code[3]);
  }
}

__device__ __forceinline__ void store_scale(const FormatLayout& layout, uint8_t* scales, int group,
                                            uint32_t bits) {
  if (layout.scale == ScaleType::kFloat32) {
    reinterpret_cast<uint32_t*>(scales)[group] = bits;
  } else if (layout.scale != ScaleType::kCache) {
    scales[group] = static_cast<uint8_t>(bits);
  }
}

// Row [d_qk] to the token's codes and scales. All threads of the block, whole warps, must call it.
template <class Element>
__device__ void quantise_row(const FormatLayout& layout, const Element* row, float kv_scale,
                             uint8_t* codes, uint8_t* scales, bool pad_scales) {
  const int group_threads = layout.group / kQuantisedColumns;
  const int stride = static_cast<int>(blockDim.x) * kQuantisedColumns;
  // Every thread of a warp takes part in the reduction, also one with no columns.
  const int warp_columns = 32 * kQuantisedColumns;
  const int end = (layout.d_qk + warp_columns - 1) / warp_columns * warp_columns;
  for (int column = threadIdx.x * kQuantisedColumns; column < end; column += stride) {
    float x[kQuantisedColumns] = {};
    const bool exists = column < layout.d_qk, coded = column < layout.codes;
    if (exists) {
      const auto from = *reinterpret_cast<const Columns<Element>*>(row + column);
#pragma unroll
      for (int i = 0; i < kQuantisedColumns; ++i) {
        x[i] = coded ? load_finite(from.x[i]) : Element::to_float(from.x[i]);
      }
    }
    uint32_t amax = 0;
#pragma unroll
    for (int i = 0; i < kQuantisedColumns; ++i) amax = max(amax, amax_bits(layout, x[i]));
    amax = reduce_amax(amax, group_threads);
    if (coded) {
      const GroupScale scale = group_scale(layout, amax, kv_scale);
      uint8_t code[kQuantisedColumns];
#pragma unroll
      for (int i = 0; i < kQuantisedColumns; ++i) code[i] = encode(layout, scale, x[i]);
      store_codes(layout, codes, column, code);
      if (column % layout.group == 0) {
        store_scale(layout, scales, column / layout.group, scale.bits);
      }
    } else if (exists) {
      auto* rope = reinterpret_cast<ushort4*>(codes + layout.rope_offset);
      rope[(column - layout.codes) / kQuantisedColumns] =
          make_ushort4(rope_bits(x[0]), rope_bits(x[1]), rope_bits(x[2]), rope_bits(x[3]));
    }
  }
  if (pad_scales && threadIdx.x == 0) scales[layout.codes / layout.group] = 0;
}

}  // namespace flashmla::sm90
