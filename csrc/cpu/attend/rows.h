// The rows of a paged cache of any format, by token.
#pragma once

#include <cstdint>

#include "formats.h"
#include "params/dtype.h"

namespace flashmla::cpu {

// Where a token's bytes lie. plane[0] is null for a token that reads as zeros.
struct Row {
  const uint8_t* plane[2];
};

struct RowFormat {
  Format format;
  DType
      dtype;  // that the values are rounded to: value = dtype(code * scale); of dense rows, theirs
  int d_qk;
};

class CacheRows {
 public:
  RowFormat format;

  // Dense rows of one KV head: [num_blocks, block_size, h_kv, row_stride].
  static CacheRows dense(const void* blocks, int64_t num_blocks, int64_t block_bytes, DType dtype,
                         int d_qk, int h_kv, int kv_head, int64_t row_stride) {
    CacheRows rows;
    rows.format = {Format::kDense, dtype, d_qk};
    const int64_t row_bytes = row_stride * itemsize(dtype);
    rows.plane_[0] = static_cast<const uint8_t*>(blocks) + kv_head * row_bytes;
    rows.stride_[0] = h_kv * row_bytes;
    rows.num_blocks_ = num_blocks;
    rows.block_bytes_ = block_bytes;
    return rows;
  }

  // Rows of another format.
  static CacheRows coded(const void* blocks, int64_t num_blocks, int64_t block_bytes,
                         int block_size, Format format, DType dtype) {
    const FormatLayout layout = layout_of(format);
    CacheRows rows;
    rows.format = {format, dtype, layout.d_qk};
    for (int plane = 0; plane < 2; ++plane) {
      rows.plane_[plane] =
          static_cast<const uint8_t*>(blocks) + plane_offset(layout, plane, block_size);
      rows.stride_[plane] = layout.plane_bytes[plane];
    }
    rows.num_blocks_ = num_blocks;
    rows.block_bytes_ = block_bytes;
    return rows;
  }

  // Of token `offset` of a block; null for a block id out of range.
  Row row(int64_t block, int64_t offset) const {
    if (block < 0 || block >= num_blocks_) return {};
    const int64_t begin = block * block_bytes_;
    return {{plane_[0] + begin + offset * stride_[0],
             stride_[1] == 0 ? nullptr : plane_[1] + begin + offset * stride_[1]}};
  }

 private:
  const uint8_t* plane_[2] = {};
  int64_t stride_[2] = {};  // bytes from token to token in each plane
  int64_t num_blocks_, block_bytes_;
};

}  // namespace flashmla::cpu
