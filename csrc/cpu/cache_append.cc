#include "cpu/cache_append.h"

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "elements.h"
#include "quantise.h"

namespace flashmla::cpu {
namespace {

constexpr int64_t kBytesPerTask = 256 * 1024;  // less is not worth handing to another thread

struct Slot {
  int64_t block;  // -1 where the row is to be dropped
  int token;      // of the block
};

// Where rows[i, j] goes.
Slot destination(const CacheAppendParams& params, int64_t i, int64_t j) {
  if (j >= params.num_new[i]) return {-1, 0};
  const int64_t position = params.positions[i] + j;
  if (position < 0 || position >= int64_t{params.max_blocks} * params.block_size) return {-1, 0};
  const int64_t block = params.block_table[i * params.max_blocks + position / params.block_size];
  if (block < 0 || block >= params.num_blocks) return {-1, 0};
  return {block, static_cast<int>(position % params.block_size)};
}

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

Status run_cache_append(const CacheAppendParams& params, const ParallelFor& parallel_for) {
  const int64_t num_rows = int64_t{params.b} * params.s_new;
  const int64_t row_bytes = int64_t{params.h_kv} * params.d * itemsize(params.rows_dtype);
  const int64_t rows_per_task = kBytesPerTask / std::min(row_bytes, kBytesPerTask);
  const auto* rows = static_cast<const char*>(params.rows);
  auto* updated = static_cast<char*>(params.updated);
  if (params.updated != params.blocks) {
    std::memcpy(updated, params.blocks, params.num_blocks * params.block_bytes);
  }

  const auto num_tasks = static_cast<int>((num_rows + rows_per_task - 1) / rows_per_task);
  parallel_for(num_tasks, [&](int task) {
    const int64_t begin = task * rows_per_task;
    const int64_t end = std::min(begin + rows_per_task, num_rows);
    for (int64_t row = begin; row < end; ++row) {
      const Slot slot = destination(params, row / params.s_new, row % params.s_new);
      if (slot.block < 0) continue;
      const char* from = rows + row * row_bytes;
      char* block = updated + slot.block * params.block_bytes;
      if (params.format == Format::kDense) {
        copy_row(params, from, block, slot.token);
        continue;
      }
      with_element(params.rows_dtype, [&](auto element) {
        const auto* elements = reinterpret_cast<const decltype(element)*>(from);
        quantise_row(params, elements, block, slot.token);
      });
    }
  });
  return Status::Ok();
}

}  // namespace flashmla::cpu
