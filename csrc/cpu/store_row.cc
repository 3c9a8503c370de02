#include "cpu/store_row.h"

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "elements.h"
#include "formats.h"
#include "quantise.h"

namespace flashmla::cpu {
namespace {

void copy_row(const CacheAppendParams& params, const char* row, char* block, int token) {
  const int64_t size = itemsize(params.rows_dtype);
  char* to = block + token * params.h_kv * params.row_stride * size;
  if (params.row_stride == params.d) {
    std::memcpy(to, row, params.h_kv * params.d * size);
    return;
  }
  for (int head = 0; head < params.h_kv; ++head) {
    std::memcpy(to + head * params.row_stride * size, row + head * params.d * size,
                params.d * size);
  }
}

// One group of columns: its codes and its scale.
template <class Element>
void quantise_group(const FormatLayout& layout, const Element* row, int group, float kv_scale,
                    uint8_t* codes, uint8_t* scales) {
  const int begin = group * layout.group;
  uint32_t amax = 0;
  for (int k = 0; k < layout.group; ++k) {
    amax = std::max(amax, amax_bits(layout, load_finite(row[begin + k])));
  }
  const GroupScale scale = group_scale(layout, amax, kv_scale);
  for (int k = 0; k < layout.group; ++k) {
    const uint8_t code = encode(layout, scale, load_finite(row[begin + k]));
    uint8_t* to = codes + begin + k;
    if (layout.scale != ScaleType::kE4M3) {
      *to = code;
    } else {
      to = codes + (begin + k) / 2;
      *to = k % 2 == 0 ? code : static_cast<uint8_t>(*to | code << 4);
    }
  }
  if (layout.scale == ScaleType::kFloat32) {
    std::memcpy(scales + 4 * group, &scale.bits, 4);
  } else if (layout.scale != ScaleType::kCache) {
    scales[group] = static_cast<uint8_t>(scale.bits);
  }
}

template <class Element>
void quantise_row(const CacheAppendParams& params, const Element* row, char* block, int token) {
  const FormatLayout layout = layout_of(params.format);
  auto* bytes = reinterpret_cast<uint8_t*>(block);
  uint8_t* codes = bytes + row_offset(layout, 0, params.block_size, token);
  uint8_t* scales = bytes + layout.scale_offset +
                    row_offset(layout, layout.scale_plane, params.block_size, token);
  const float kv_scale = layout.scale == ScaleType::kCache ? *params.kv_scale : 1.0f;
  const int groups = layout.codes / layout.group;
  for (int group = 0; group < groups; ++group) {
    quantise_group(layout, row, group, kv_scale, codes, scales);
  }
  if (params.format == Format::kV4) scales[groups] = 0;  // padding
  for (int k = layout.codes; k < layout.d_qk; ++k) {
    const uint16_t bits = rope_bits(Element::to_float(row[k]));
    std::memcpy(codes + layout.rope_offset + 2 * (k - layout.codes), &bits, 2);
  }
}

}  // namespace

void store_row(const CacheAppendParams& params, const void* row, AppendSlot slot) {
  char* block = static_cast<char*>(params.updated) + slot.block * params.block_bytes;
  if (params.format == Format::kDense) {
    copy_row(params, static_cast<const char*>(row), block, slot.token);
    return;
  }
  with_element(params.rows_dtype, [&](auto element) {
    quantise_row(params, static_cast<const decltype(element)*>(row), block, slot.token);
  });
}

void begin_append(const CacheAppendParams& params) {
  if (params.updated == params.blocks) return;
  std::memcpy(params.updated, params.blocks, params.num_blocks * params.block_bytes);
}

}  // namespace flashmla::cpu
